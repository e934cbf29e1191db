"""Continue texts greedily in LiteRT-LM; runs without moec.

python generate_with_litert_lm.py BUNDLE CACHE '["text", ...]' TOKENS: a JSON object of answers and versions.
"""

import importlib.metadata
import json
import sys

import litert_lm
from litert_lm import interfaces

bundle, cache, texts, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
engine = litert_lm.Engine(bundle, backend=interfaces.Backend.CPU(), cache_dir=cache)
greedy = interfaces.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0)
answers = []
for text in texts:
    session = engine.create_session(apply_prompt_template=False, sampler_config=greedy, max_output_tokens=tokens)
    session.run_prefill([text])
    answers.append(session.run_decode().texts[0])
    session.close()
print(json.dumps({"answers": answers, "version": importlib.metadata.version("litert-lm-api")}))

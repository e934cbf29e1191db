// Greedy tokens of an artifact in transformers.js: node generate_with_transformers_js.mjs FOLDER NAME IDS COUNT FLAVOR
import { AutoModelForCausalLM, env, Tensor } from "@huggingface/transformers";

const [folder, name, ids, count, flavor] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = folder;
const prompt = JSON.parse(ids).map(BigInt);
// An artifact for browsers says in config.json what to load.
const files = flavor === "web" ? {} : { dtype: "fp32", subfolder: "", use_external_data_format: true };
// By default, ONNX Runtime rounds activations to int8 where weights are codes of QDQ; moec's runner does not.
const session_options = { extra: { session: { qdq_matmulnbits_accuracy_level: "0" } } };
const model = await AutoModelForCausalLM.from_pretrained(name, { device: "cpu", session_options, ...files });
const shape = [1, prompt.length];
const output = await model.generate({
  input_ids: new Tensor("int64", BigInt64Array.from(prompt), shape),
  attention_mask: new Tensor("int64", BigInt64Array.from(prompt, () => 1n), shape),
  max_new_tokens: Number(count),
  do_sample: false,
  eos_token_id: 1_000_000,
});
console.log(JSON.stringify(output.tolist()[0].slice(prompt.length).map(Number)));

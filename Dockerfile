# moec on a CPU: docker build -t moec . && docker run --rm -v "$PWD:/work" moec export CHECKPOINT --target onnx -o out
#
# EXTRAS: extras of moec, such as "tflite,coreml,serve". TORCH_INDEX: where pip finds torch built for CPUs alone.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE __init__.py __main__.py cli.py py.typed ./
COPY compiler compiler
COPY passes passes
COPY quantize quantize
COPY targets targets
COPY golden_models golden_models
RUN pip install --no-cache-dir build && python -m build --wheel --outdir /dist

FROM python:${PYTHON}-slim
ARG EXTRAS=serve
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" 'torch==2.13.0'
COPY --from=build /dist /dist
RUN pip install --no-cache-dir "$(echo /dist/moec-*.whl)[$EXTRAS]" && rm -r /dist
RUN useradd --create-home --uid 1000 moec
USER moec
WORKDIR /work
ENTRYPOINT ["moec"]
CMD ["--help"]

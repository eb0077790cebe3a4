# kbne-edit on NVIDIA GPUs. PyTorch's wheels bring the CUDA libraries; the host needs the driver and the container toolkit.
#   docker build -f docker/cuda.Dockerfile -t kbne-edit:cuda .
#   docker run --rm --gpus all kbne-edit:cuda doctor
# For another CUDA version than that of the default wheels: --build-arg TORCH_INDEX=URL, as pytorch.org names it.
FROM python:3.12-slim AS build
ARG TORCH_INDEX=""
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY kbne_edit kbne_edit
COPY recipes recipes
RUN python -m venv /opt/kbne \
    && if [ -n "$TORCH_INDEX" ]; then /opt/kbne/bin/pip install --no-cache-dir -c constraints.txt --index-url "$TORCH_INDEX" torch; fi \
    && /opt/kbne/bin/pip install --no-cache-dir -c constraints.txt '.[eval,quantised]'

FROM python:3.12-slim
COPY --from=build /opt/kbne /opt/kbne
ENV PATH=/opt/kbne/bin:$PATH HF_HOME=/work/.cache/huggingface \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --create-home --uid 1000 kbne && mkdir /work && chown kbne /work
USER kbne
WORKDIR /work
ENTRYPOINT ["kbne-edit"]
CMD ["--help"]

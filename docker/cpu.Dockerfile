# kbne-edit on the processor. Build from the root of the repository:
#   docker build -f docker/cpu.Dockerfile -t kbne-edit:cpu .
# A plain `pip install torch` brings the CUDA build on x86: pass the index of the CPU build that pytorch.org names,
#   --build-arg TORCH_INDEX=URL
# and the image is some 4 GB smaller.
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
ENV PATH=/opt/kbne/bin:$PATH HF_HOME=/work/.cache/huggingface
# No root: what is written to a mounted folder belongs to this user; --user changes it.
RUN useradd --create-home --uid 1000 kbne && mkdir /work && chown kbne /work
USER kbne
WORKDIR /work
ENTRYPOINT ["kbne-edit"]
CMD ["--help"]

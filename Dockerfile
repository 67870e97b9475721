# For clusters with NVIDIA GPUs: PyTorch, NCCL, Transformer Engine, flash-attn and DALI come with NVIDIA's image and are left as they are.
# Not built where this was written (no Docker there): take it as a start. 25.12 has CUDA 13.1 and a PyTorch 2.10 of NVIDIA's own; setup.py
# asks for 2.11, which is what was tested, so take a newer tag where there is one: --build-arg TAG=YY.MM-py3.
#
#   docker build -t llava_mcore .
#   docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 -v /data:/data llava_mcore
ARG TAG=25.12-py3
FROM nvcr.io/nvidia/pytorch:${TAG}

WORKDIR /workspace/llava_mcore
COPY . .

# The package first and alone; then what it requires, without torch: pip would put a plain build in place of NVIDIA's.
RUN pip install --no-cache-dir --no-deps -e . \
 && python -c "import importlib.metadata, re; print(*(r for r in importlib.metadata.requires('llava_mcore') if 'extra ==' not in r and not re.match(r'torch\b', r)), sep='\n')" > /tmp/requirements.txt \
 && pip install --no-cache-dir -r /tmp/requirements.txt \
 && python -c "import torch; assert torch.version.cuda, 'torch was replaced by a build without CUDA'"

ENTRYPOINT ["bash"]

#!/bin/sh
# Make the peers' own environment: llm-compressor, pinned, with the transformers that it asks for.
# usage: sh eval/peers/setup.sh FOLDER     (then: compare.py --peers FOLDER)
# PYTHON chooses the interpreter. A CPU build of torch is taken where pip finds one; with an index of
# its own: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu TORCH=2.13.0+cpu
set -eu
folder=${1:?"no folder given; name one outside the repository: sh eval/peers/setup.sh ../peers"}
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet "torch==${TORCH:-2.13.0+cpu}" \
    llmcompressor==0.14.0.1 transformers==5.17.0 compressed-tensors==0.19.0 safetensors==0.8.0
"$folder/bin/pip" list 2>/dev/null | grep -iE "^(llmcompressor|torch|transformers|compressed) "

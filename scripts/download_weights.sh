#!/usr/bin/env bash
# Fetch the published weights with the Hugging Face command line (hf). Files already there are kept, broken downloads resume.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/download_weights.sh [--teacher] [--help]

Fetches into the repository:
  wan_models/Wan2.1-T2V-1.3B   Wan-AI/Wan2.1-T2V-1.3B: transformer, VAE, text encoder (about 17 GB)
  longlive_models              Efficient-Large-Model/LongLive-1.3B: models/longlive_base.pt, models/lora.pt
With --teacher also all that training takes:
  wan_models/Wan2.1-T2V-14B    Wan-AI/Wan2.1-T2V-14B, the teacher (about 69 GB)
  checkpoints/ode_init.pt      gdhe17/Self-Forcing: a causal model to begin with (about 6 GB)
  prompts                      Efficient-Large-Model/LongLive-1.3B: the prompts before and after a switch

Run it again after an interruption: it resumes. HF_TOKEN, HF_ENDPOINT and HF_HOME are honoured.
TEXT
}

teacher=false
for argument in "$@"; do
    case "$argument" in
        --teacher) teacher=true ;;
        -h | --help) usage; exit 0 ;;
        *) echo "error: unknown argument $argument; accepted are --teacher and --help" >&2; exit 2 ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -x .venv/bin/hf ]]; then
    hf=.venv/bin/hf
elif ! hf=$(command -v hf); then
    echo "error: the command hf is missing; bash scripts/setup.sh or pip install huggingface_hub installs it" >&2
    exit 2
fi

"$hf" download Wan-AI/Wan2.1-T2V-1.3B --local-dir wan_models/Wan2.1-T2V-1.3B
"$hf" download Efficient-Large-Model/LongLive-1.3B --include "models/*" --local-dir longlive_models
if $teacher; then
    "$hf" download Wan-AI/Wan2.1-T2V-14B --local-dir wan_models/Wan2.1-T2V-14B
    "$hf" download gdhe17/Self-Forcing checkpoints/ode_init.pt --local-dir .
    "$hf" download Efficient-Large-Model/LongLive-1.3B --include "prompts/*" --local-dir .
fi

#!/usr/bin/env bash
# Installs what is missing and runs every test: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/install.sh
# Transformer Engine's Python, without its kernels: tests/te runs it on a CPU. Where packages lie it would pass for an installation.
te=build/transformer_engine-2.11.0
[ -d "$te" ] || "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$te" transformer_engine==2.11.0
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check --quiet .
"$PYTHON" -m mypy --no-error-summary
exec "$PYTHON" -m pytest "$@"

#!/usr/bin/env bash
# Installs what is missing and runs every test: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/install.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check --quiet .
"$PYTHON" -m mypy --no-error-summary
exec "$PYTHON" -m pytest "$@"

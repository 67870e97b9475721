# Sourced by the scripts of this repository: leaves $PYTHON, a Python with llava_mcore installed, and says what it does.
# It makes .venv in the checkout once and uses it again until setup.py changes. An environment that is active and holds the
# package (a container, say) is used as it is.

install_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3 python; do  # 3.11 is the tested one
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or 3.12 is needed and was not found; install one and run this again" >&2
    return 1
}

if [ "${LLAVA_MCORE_PYTHON:-}" ]; then
    PYTHON=$LLAVA_MCORE_PYTHON
else
    PYTHON=$install_root/.venv/bin/python
    install_stamp=$install_root/.venv/.installed-$(cksum < "$install_root/setup.py" | tr ' ' '-')
    if [ ! -e "$install_stamp" ]; then
        [ -x "$PYTHON" ] || "$(find_python)" -m venv "$install_root/.venv" || exit 1
        echo "installing into $install_root/.venv (about two minutes the first time)"
        # A plain "torch" may bring gigabytes of CUDA packages; without a GPU the tested version comes first and stays.
        if ! command -v nvidia-smi > /dev/null; then
            "$PYTHON" -m pip install --quiet --disable-pip-version-check torch==2.13.0 || exit 1
        fi
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -e "$install_root[dev]" || exit 1
        rm -f "$install_root"/.venv/.installed-*
        touch "$install_stamp"
    fi
fi
export PYTHON

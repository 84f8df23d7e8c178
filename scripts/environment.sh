# Sourced by demo.sh and test.sh: goes to the project's root and makes .venv ready, once for each set of requirements.
# With TRANSFORMERS=5.12 in the environment, the same in an environment of its own with that version of transformers;
# with GROUP=tools, in one that also has the packages of tests/tools/requirements.txt (or GROUP=engines/vllm, ...).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv${TRANSFORMERS:+-transformers-$TRANSFORMERS}${GROUP:+-${GROUP//\//-}}
group=${GROUP:+tests/$GROUP/requirements.txt}
constraints=constraints.txt
if [ -e "tests/${GROUP:-}/constraints.txt" ]; then
    constraints=tests/$GROUP/constraints.txt
fi
stamp=$venv/.installed-$(cat pyproject.toml "$constraints" $group | cksum | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: $("$python" --version) is too old; set PYTHON to a Python of 3.10 or newer" >&2
        exit 1
    }
    echo "Setting up $venv (once; a few minutes and about 1.5 GB)"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    if [ -n "${TRANSFORMERS:-}" ]; then
        # Each version wants its own hub client and tokenizers.
        grep -vE '^(transformers|huggingface_hub|tokenizers)==' "$constraints" > "$venv/constraints.txt"
        echo "transformers==$TRANSFORMERS" >> "$venv/constraints.txt"
        constraints=$venv/constraints.txt
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$constraints" --editable '.[dev,gguf,onnx]' \
        ${group:+--requirement "$group"}
    if [ -n "$group" ] && [ -e "tests/$GROUP/after_install.sh" ]; then
        (. "$venv/bin/activate" && . "tests/$GROUP/after_install.sh")
    fi
    touch "$stamp"
fi
. "$venv/bin/activate"
# Threads that wait by spinning cost tenfold where other programs want the same cores.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

#!/usr/bin/env bash
# pymdown-extensions 13 asks for Python 3.11.5 or newer, and Debian 12's Python is 3.11.2. A constraints file that was made
# under a later 3.11 names 13.1.2; under 3.11.2 pip then speaks of a conflict of two requirements that agree: 13.1.2 is
# above the 11.0.1 that mkdocs-material wants. The Python is not named; pip 23.0, which comes with Debian 12, does not say
# either that there is nothing for this environment. Asked for the package by itself, pip names the Python. So a library
# whose declared range begins at 3.11 has not been tried under 3.11 by a machine that has 3.11.7.
# Seen with the versions below; the Python is given to pip as a target, so any will do for running this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q pip==26.3
echo "pymdown-extensions==13.1.2" > constraints.txt
asked() {
    local python=$1
    shift
    venv/bin/pip install --dry-run --only-binary=:all: --target target --python-version "$python" "$@" 2>&1 || true
}
of_two=$(asked 3.11.2 -c constraints.txt mkdocs-material==9.8.2)
grep "conflicting dependencies" <<< "$of_two"
grep "depends on pymdown-extensions>=11.0.1" <<< "$of_two"
grep "user requested (constraint) pymdown-extensions==13.1.2" <<< "$of_two"
if grep -i "python version\|Requires-Python" <<< "$of_two"; then exit 1; fi
alone=$(asked 3.11.2 pymdown-extensions==13.1.2)
grep -o "13.1.2 Requires-Python >=3.11.5" <<< "$alone"
later=$(asked 3.11.5 -c constraints.txt mkdocs-material==9.8.2)
grep -o "Would install .*" <<< "$later" | grep -o "pymdown-extensions-13.1.2"

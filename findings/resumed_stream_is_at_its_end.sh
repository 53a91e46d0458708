#!/usr/bin/env bash
# A streamed dataset that is mapped or filtered, stopped after some rows, saved with state_dict() and resumed with
# load_state_dict(), gives no row at all in datasets 4.7.0: it says that it is at its end, and raises nothing. A training
# run that goes on from a checkpoint would begin the next pass and leave out the rest of this one. A plain stream is
# resumed where it was. The state has to be loaded into a new stream of the same making, as a new process does.
# map() is right from 4.8.x on, filter() from 5.0.1 on; 5.0.0 still loses the filtered rows.
# Seen: 4.7.0 plain right, mapped lost, filtered lost; 5.0.0 right, right, lost; 5.0.1 and 5.2.0 right in all three.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
look='
from datasets import Dataset
rows = Dataset.from_dict({"n": list(range(24))})
made = {
    "plain": lambda: rows.to_iterable_dataset(),
    "mapped": lambda: rows.to_iterable_dataset().map(lambda row: {"n": row["n"]}),
    "filtered": lambda: rows.to_iterable_dataset().filter(lambda row: True),
}
for name, make in made.items():
    stream = make()
    reading = iter(stream)
    for _ in range(5):
        next(reading)
    resumed = make()
    resumed.load_state_dict(stream.state_dict())
    left = [row["n"] for row in resumed]
    print(name, "right" if left == list(range(5, 24)) else "lost" if not left else left)'
seen=""
for version in 4.7.0 5.0.0 5.0.1 5.2.0; do
    "$folder/venv/bin/pip" install -q "datasets==$version"
    seen+="$version $("$folder/venv/bin/python" -c "$look" | paste -sd' ')"$'\n'
done
printf '%s' "$seen"
[ "$seen" = "4.7.0 plain right mapped lost filtered lost
5.0.0 plain right mapped right filtered lost
5.0.1 plain right mapped right filtered right
5.2.0 plain right mapped right filtered right
" ]

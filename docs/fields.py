"""Writes docs/fields.md and the tables of others' fields in docs/trainer.md and migrating.md: python docs/fields.py.

What they say is said in the package: the help of each field, and amid_trl/training/inherited.py.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import DistillationConfig, SFTConfig
from trl.import_utils import suppress_experimental_warning

from amid_trl import AMiDConfig
from amid_trl.fields import own_fields, type_name
from amid_trl.training.inherited import DISTILLATION_DIFFERS, HONOURED, NOT_OF_DISTILLATION, NOT_OF_GOLD, REFUSED
from amid_trl.training.run_fields import GROUPS


DOCS = Path(__file__).parent

INTRODUCTION = """# Fields

What `AMiDConfig` has beyond `GKDConfig`, or has otherwise. Written by `python docs/fields.py` from the help of each
field, which `amid-trl train --help` shows too. In YAML and on the command line the names are the same:

```yaml
divergence: ab
divergence_kwargs: {alpha: 0.2, beta: 0.7}   # on the command line a JSON string
```

GKD's own `lmbda`, `temperature`, `max_new_tokens`, `beta`, `seq_kd`, `disable_dropout`, `teacher_model_name_or_path`
and `teacher_model_init_kwargs` keep their meaning. What becomes of the fields of `SFTConfig` and of TRL's
`DistillationConfig` is in [trainer](trainer.md#fields-of-sftconfig).
"""


def new_fields(config: type, *known: type) -> list[dataclasses.Field]:
    """The fields of a dataclass that none of the known ones has."""
    names = {field.name for other in known for field in dataclasses.fields(other)}
    return [field for field in dataclasses.fields(config) if field.name not in names]


def table(header: list[str], rows: list[list[str]]) -> str:
    """As Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def code(value: Any) -> str:
    """A value as code."""
    return f"`{value!r}`"


def fields_page() -> str:
    """docs/fields.md."""
    parts = [INTRODUCTION]
    for group in GROUPS:
        title = (group.__doc__ or "").strip().splitlines()[0].removeprefix("Parameters that control ").rstrip(".")
        rows = [
            [f"`{field.name}`", type_name(group, field.name), code(field.default), field.metadata["help"]]
            for field in own_fields(group)
        ]
        parts.append(f"## {title[0].upper()}{title[1:]}\n\n" + table(["field", "type", "default", ""], rows))
    return "\n".join(parts)


def sft_table() -> str:
    """What becomes of SFTConfig's own fields, and of those of TrainingArguments that are refused."""
    own = [field.name for field in new_fields(SFTConfig, TrainingArguments)]
    inherited = [name for name in REFUSED if name not in own]
    return table(["field", ""], [[f"`{name}`", _becomes(name)] for name in (*own, *inherited)])


def _becomes(name: str) -> str:
    if name in HONOURED:
        return HONOURED[name]
    accepted, why = REFUSED[name]
    return f"**only {' or '.join(map(code, accepted))}**: {why}"


def distillation_table() -> str:
    """DistillationConfig's own fields: their defaults there and here, and what is different."""
    return _beside(DistillationConfig, NOT_OF_DISTILLATION)


def gold_table() -> str:
    """Of GOLDConfig's own fields those that are not the same here, and what is different."""
    with suppress_experimental_warning():
        from trl.experimental.gold import GOLDConfig

    return _beside(GOLDConfig, NOT_OF_GOLD, leave_out_the_same=True)


def _beside(config: Any, refused: Mapping[str, str], leave_out_the_same: bool = False) -> str:
    here, rows = {field.name: field.default for field in dataclasses.fields(AMiDConfig)}, []
    for field in _declared_by(config):
        if field.name in refused:
            default = "`[]`" if field.default is dataclasses.MISSING else code(field.default)
            rows.append([f"`{field.name}`", default, "**refused**", refused[field.name]])
            continue
        same = here[field.name] == field.default
        if same and leave_out_the_same:
            continue
        default = "the same" if same else code(here[field.name])
        rows.append([f"`{field.name}`", code(field.default), default, DISTILLATION_DIFFERS.get(field.name, "")])
    return table(["field", "default there", "here", "what is different"], rows)


def _declared_by(config: Any) -> list[dataclasses.Field]:
    """The fields that it adds to those of transformers, and the learning rate, whose default it changes."""
    ours = new_fields(config, TrainingArguments)
    return [field for field in dataclasses.fields(config) if field in ours or field.name == "learning_rate"]


TABLES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "trainer.md": {"sft": sft_table, "distillation": distillation_table},
    "migrating.md": {"gold": gold_table},
}


def with_tables(name: str) -> str:
    """A page of TABLES with its generated tables as they should be."""
    page = (DOCS / name).read_text(encoding="utf-8")
    for place, made in TABLES[name].items():
        start, end = f"<!-- {place} -->\n", f"<!-- end of {place} -->"
        text = f"{start}{made()}{end}"
        page, count = re.subn(f"{start}.*?{end}", lambda _, text=text: text, page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"docs/{name} has {count} places for the table {place}")
    return page


def main() -> None:
    """Write all of them."""
    (DOCS / "fields.md").write_text(fields_page(), encoding="utf-8")
    for name in TABLES:
        (DOCS / name).write_text(with_tables(name), encoding="utf-8")


if __name__ == "__main__":
    main()

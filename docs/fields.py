"""Writes docs/fields.md and the two tables of inherited fields in docs/trainer.md: python docs/fields.py.

What they say is said in the package: the help of each field, and amid_trl/training/inherited.py.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import DistillationConfig, SFTConfig

from amid_trl import AMiDConfig
from amid_trl.fields import own_fields, type_name
from amid_trl.training.inherited import DISTILLATION_DIFFERS, HONOURED, NOT_OURS, REFUSED
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
    here = {field.name: field.default for field in dataclasses.fields(AMiDConfig)}
    rows = []
    for field in new_fields(DistillationConfig, TrainingArguments):
        if field.name in NOT_OURS:
            rows.append([f"`{field.name}`", code(field.default), "**refused**", NOT_OURS[field.name]])
            continue
        default = "the same" if here[field.name] == field.default else code(here[field.name])
        rows.append([f"`{field.name}`", code(field.default), default, DISTILLATION_DIFFERS.get(field.name, "")])
    return table(["field", "default there", "here", "what is different"], rows)


def with_tables(page: str) -> str:
    """docs/trainer.md with its generated tables as they should be."""
    for name, made in {"sft": sft_table(), "distillation": distillation_table()}.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        page, count = re.subn(f"{start}.*?{end}", lambda _, text=f"{start}{made}{end}": text, page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"docs/trainer.md has {count} places for the table {name}")
    return page


def main() -> None:
    """Write both."""
    (DOCS / "fields.md").write_text(fields_page(), encoding="utf-8")
    trainer = DOCS / "trainer.md"
    trainer.write_text(with_tables(trainer.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

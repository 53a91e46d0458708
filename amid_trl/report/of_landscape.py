"""A landscape: the suggestion with its reason, the heat map and its table."""

from amid_trl.choosing.grid import Setting
from amid_trl.choosing.landscape import POINT_COLUMNS
from amid_trl.choosing.report import HEADINGS, point_text, suggested_yaml
from amid_trl.choosing.suggestion import setting_of
from amid_trl.plotting.heat_map import PANELS, heat_map
from amid_trl.report.kinds import Found, check_keys
from amid_trl.report.page import Number, PageSection, Table, drawn


def landscape_section(found: Found) -> PageSection:
    """The section of one landscape."""
    results = found.content
    named = [("KL(p‖q)", results["forward_kl"]), ("KL(q‖p)", results["reverse_kl"])]
    for point in (*(point for _, point in named), *results["points"]):
        keys = (*Setting.__dataclass_fields__, *POINT_COLUMNS, "intervals")
        check_keys(point, keys, f"a point in {found.file}", found.kind)
    check_keys(results["suggestion"], ("point", "reason"), f"the suggestion in {found.file}", found.kind)
    rows = [
        (name, [Number(point_text(point, column), point[column]) for column in HEADINGS.values()])
        for name, point in [*named, *((str(setting_of(point)), point) for point in results["points"])]
    ]
    figure = heat_map(results)
    shown_columns = ", ".join(title for title, *_ in PANELS.values())
    alt = f"Heat maps over α and λ: {shown_columns}. The table below has the numbers."
    about = results.get("about", {})
    return PageSection(
        title=f"Landscape {found.name}",
        facts=[
            *((name, str(about[name])) for name in ("student", "teacher", "dataset") if about.get(name)),
            ("tokens", f"{results['tokens']:,} of {results['of_tokens']:,}, in {results['rows']:,} rows"),
        ],
        code="\n".join(suggested_yaml(results)),
        paragraphs=[results["suggestion"]["reason"]],
        pictures=[] if figure is None else [drawn(figure, alt, "A framed cell is the suggestion.")],
        tables=[
            Table(
                f"{len(results['points'])} settings: means over the tokens, ± half of a 95 % interval over rows",
                ["setting", *HEADINGS],
                rows,
                folded=True,
            )
        ],
    )

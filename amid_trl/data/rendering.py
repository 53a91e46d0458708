"""Messages -> the text that a chat template makes of them, in the form of message that the template can read."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, cast

from transformers import PreTrainedTokenizerBase
from trl import get_training_chat_template

from amid_trl._trl import has_generation_markers, render_jinja_template
from amid_trl.data.messages import Message, object_arguments, with_json_arguments
from amid_trl.data.rows import BadRow


Span = tuple[int, int]


class Rendered(NamedTuple):
    """The text of a conversation and its `{% generation %}` spans in characters, None without such marks."""

    text: str
    spans: list[Span] | None


@dataclass(frozen=True)
class Renderer:
    """One chat template with its options, `tools` among them."""

    template: str
    options: Mapping[str, Any]

    def __call__(self, messages: list[Message], *, generation_prompt: bool = False) -> Rendered:
        """The conversation, with the start of the assistant's next turn if there is a `generation_prompt`.

        Arguments of tool calls are rendered as objects; a template that cannot read these, or writes them as Python
        would, gets them as JSON text.

        Raises:
            BadRow: with the template's words, where it refuses the messages.
        """
        if _content_form(self.template) == "parts":
            messages = [{**message, "content": _as_parts(message["content"])} for message in messages]
        arguments = object_arguments(messages)
        try:
            rendered = _render(self.template, messages, self.options, generation_prompt)
        except Exception as error:
            if not arguments:
                raise _refusal(error) from error
            return self._with_json(messages, generation_prompt, error)
        if any(values and str(values) in rendered.text for values in arguments):
            return self._with_json(messages, generation_prompt)
        return rendered

    def without_tools(self, messages: list[Message], *, generation_prompt: bool = False) -> str | None:
        """The text as it would be without tools; None where the template refuses that."""
        try:
            return Renderer(self.template, {**self.options, "tools": None})(
                messages, generation_prompt=generation_prompt
            ).text
        except BadRow:
            return None

    def _with_json(self, messages: list[Message], generation_prompt: bool, first: Exception | None = None) -> Rendered:
        try:
            return _render(self.template, with_json_arguments(messages), self.options, generation_prompt)
        except Exception as error:
            raise _refusal(first or error) from error


def renderer(tokenizer: PreTrainedTokenizerBase, template: str | None, options: Mapping[str, Any]) -> Renderer:
    """The renderer of `template`, None for the tokenizer's own; a ValueError if it has none."""
    chosen = tokenizer.get_chat_template(template, cast(Any, options.get("tools")))
    return Renderer(chosen, {**tokenizer.special_tokens_map, **options})


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """TRL's training version of the tokenizer's chat template; None if there is none, or if the template is one."""
    if tokenizer.chat_template is None:
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        return None


def _render(
    template: str, messages: list[Message], options: Mapping[str, Any], generation_prompt: bool = False
) -> Rendered:
    marked = has_generation_markers(template)
    texts, spans = cast(Any, render_jinja_template)(  # annotated as returning str
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=marked,
        add_generation_prompt=generation_prompt,
        **options,
    )
    return Rendered(texts[0], list(spans[0]) if marked else None)


def _refusal(error: Exception) -> BadRow:
    return BadRow(f"the chat template cannot render it ({type(error).__name__}: {error})")


@cache
def _content_form(template: str) -> Literal["text", "parts"]:
    """What the template reads as content: templates of multimodal models know lists of parts alone, some of them."""
    probe = "What is read"
    options: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "")
    forms: dict[Literal["text", "parts"], Any] = {"text": probe, "parts": _as_parts(probe)}
    for form, content in forms.items():
        try:
            if probe in _render(template, [{"role": "user", "content": content}], options).text:
                return form
        except Exception:  # whatever a template may raise
            continue
    return "text"


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content

"""What a server says of itself that cannot be, and an address that is none, are refused before anything is asked."""

import http.server
import json
import threading

import pytest
from states_server import changing, hosting, opened
from tiny import tiny_llama, tiny_tokenizer

from amid_trl import AMiDConfig
from amid_trl.teacher.server import TeacherServer


@pytest.fixture
def model(tokenizer):
    return tiny_llama(tokenizer, seed=3)


def newer(path, headers, body):
    headers["amid-trl-protocol"] = "2"
    return body


def html(path, headers, body):
    return b"<html>"


def page(path, headers, body):
    headers.pop("amid-trl-protocol")
    return b"<html>"


def vllm(path, headers, body):
    headers.pop("amid-trl-protocol")
    return b"{}"


def words(path, headers, body):
    return b"<html>" if path.endswith("/vocabulary") else body


def numbers(path, headers, body):
    return json.dumps({"name_or_path": "x", "ids": {"a": "0"}, "added": {}}).encode() if "/voc" in path else body


def stripped(header):
    return lambda path, headers, body: headers.pop(header) and body


def saying(**changed):
    """A server that says something else of itself; what is `...` it does not say."""

    def change(path, headers, body):
        said = {**json.loads(body), **changed}
        return json.dumps({name: value for name, value in said.items() if value is not ...}).encode()

    return change


MISUNDERSTOOD = {
    "newer": (newer, "is of version 2 of the protocol, and this is version 1"),
    "html": (html, "the teacher at http.* does not say who it is: this is no JSON: '<html>'"),
    "a list": (lambda *_: b"[1]", r"who it is: AboutTeacher is a dict of fields; got '\[1\]'"),
    "missing": (saying(dim=..., head=...), "dim, head of AboutTeacher is missing"),
    "unknown": (saying(foo=1), "AboutTeacher has no foo; its fields are name, "),
    "dtype": (saying(dtype="float99"), "dtype must be 'float64', .* or 'float16'; got 'float99'"),
    "text": (saying(vocabulary="360"), "vocabulary must be int; got '360'"),
    "bound": (saying(max_rows=0), "max_rows must be at least 1; got 0"),
    "positions": (saying(positions=[]), r"positions must be int \| None; got '\[\]'"),
    "softcap": (saying(softcap="a"), r"softcap must be float \| None; got 'a'"),
    "scale": (saying(scale=float("nan")), "scale must be a positive, finite number; got nan"),
    "head": (saying(head="../x"), "head must be a SHA-256 in hexadecimal digits; got '../x'"),
    "protocol stripped": (
        stripped("amid-trl-protocol"),
        "Amid-Trl-Protocol of its answer is None in place of '1': a pro",
    ),
    "identity stripped": (stripped("amid-trl-identity"), "Amid-Trl-Identity of its answer is None in place of '"),
    "vocabulary": (words, "does not say its tokens: this is no JSON: '<html>'"),
    "numbers": (numbers, r"does not say its tokens: ids must be dict\[str, int\]; got "),
}


@pytest.mark.parametrize("name", MISUNDERSTOOD)
def test_a_server_that_says_what_cannot_be_is_refused_in_words(model, name):
    change, complaint = MISUNDERSTOOD[name]
    more = tiny_tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["<extra>"]})  # so that its tokens are asked for
    with hosting(model, more, meddle=changing(change)) as server, pytest.raises(ValueError, match=complaint):
        opened(server, tiny_tokenizer())


@pytest.mark.parametrize("change", [vllm, page])
def test_a_server_of_another_kind_is_told_from_ours(model, tokenizer, change):
    with hosting(model, tokenizer, meddle=changing(change)) as server:
        assert opened(server, tokenizer) is None


URLS = ["localhost:8000", "127.0.0.1:9", "ftp://127.0.0.1:1", "http://", "http://:8000", "http:/there", "http:///v1"]
URLS += ["http://there:port", "http://there:99999", "http://a b", "http://[::1", "http://there?x=1", "http://there/#x"]
URLS += ["nonsense", "", " http://there", "http://there\n", 8000, ["http://there"]]


@pytest.mark.parametrize("url", URLS, ids=repr)
def test_an_address_that_is_none_is_refused_with_its_field(url):
    complaint = "teacher_model_server_url must be http:// or https:// and a host, as http://there:8000 .*; got "
    with pytest.raises(ValueError, match=complaint) as refused:
        AMiDConfig("unused", use_cpu=True, teacher_model_server_url=url)
    assert str(refused.value).endswith(f"got {url!r}")
    if isinstance(url, str):
        with pytest.raises(ValueError, match=f"teachers: math: {complaint}"):
            AMiDConfig("unused", use_cpu=True, teachers={"math": {"teacher_model_server_url": url}})


def test_an_address_is_an_address():
    for url in ("http://127.0.0.1:8000", "https://there", "HTTP://There:80/v1", "http://[::1]:8000/at/some/place/"):
        AMiDConfig("unused", use_cpu=True, teacher_model_server_url=url)


def test_what_is_no_teacher_at_all_is_said_in_a_line():
    """A server of files, whose answer is a page."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(ValueError, match=r"is no amid-trl serve-teacher, .* it answers 404") as error:
            TeacherServer(url, 8, 100, patience=5.0)
        server.shutdown()
    assert "html" not in str(error.value).lower()

"""The web page: a real server on loopback, asked by a program and used in a real browser."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
from tiny_chat import QUESTION

import matvlm
from matvlm.chat.demo import LARGEST_IMAGE, Panel, Role
from matvlm.chat.speaker import Speaker, as_image
from matvlm.cli import main
from matvlm.generation import Sampling

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "infra"))

from browser import headless  # noqa: E402

FIGURES = re.compile(r"(\d+) tokens, first after [\d,]+ ms, then [\d,.]+ tokens/s")
START_SECONDS = 90.0  # measured: 6 s
TOKENS = 6


class Server:
    """``python -m matvlm demo`` in a process of its own, at any free port."""

    def __init__(self, talkers: Path, log: Path, *arguments: str):
        self.log = log
        command = [sys.executable, "-m", "matvlm", "demo", *arguments, "--port", "0", "--max-new-tokens", str(TOKENS)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with log.open("w") as file:
            self.process = subprocess.Popen(command, cwd=talkers, env=environment, stdout=file, stderr=file)

    @property
    def url(self) -> str:
        """Where the page is, as the command says when it is ready."""
        deadline = time.monotonic() + START_SECONDS
        while not (found := re.search(r"(http://127\.0\.0\.1:\d+) is ready", self.log.read_text())):
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        return found[1]

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=60) as response:
            return json.load(response)

    def ask(self, question: str, image: bytes, name: str = "picture.png") -> list[dict[str, Any]]:
        query = urllib.parse.urlencode({"question": question, "name": name})
        request = urllib.request.Request(f"{self.url}/answers?{query}", data=image, method="POST")
        with urllib.request.urlopen(request, timeout=60) as response:
            return [json.loads(line) for line in response]


@pytest.fixture(scope="module")
def servers(talkers: Path) -> Iterator[dict[str, Server]]:
    """Those of a student whose teacher is there, and of one whose teacher is gone."""
    started = {name: Server(talkers, talkers / f"{name}.log", name) for name in ("student", "orphan")}
    yield started
    for server in started.values():
        server.process.kill()
        server.process.wait()


def test_both_models_answer_as_generate_does(talkers: Path, servers: dict[str, Server]) -> None:
    models = servers["student"].get("about")["models"]
    assert [(model["name"], model["uri"]) for model in models] == [
        ("teacher", str(talkers / "teacher")),
        ("student", "student"),
    ]
    assert models[0]["facts"].startswith("2 layers, all attention; ")
    assert models[1]["facts"].startswith("Mamba-2 in 1 of 2 layers; ")
    events = servers["student"].ask(QUESTION, (talkers / "picture.png").read_bytes())
    numbers = [event["model"] for event in events]
    assert numbers == sorted(numbers)
    assert len(events) > 4  # in pieces
    for number, name in enumerate(("teacher", "student")):
        mine = [event for event in events if event["model"] == number]
        said = "".join(event.get("piece", "") for event in mine)
        expected = tiny_chat.answer(*matvlm.load(str(talkers / name)), QUESTION, [], TOKENS)
        assert said.strip() == expected.strip()
        found = FIGURES.fullmatch(mine[-1]["figures"])
        assert found
        assert int(found[1]) == TOKENS


def test_a_bad_question_is_one_message_and_no_end(talkers: Path, servers: dict[str, Server]) -> None:
    server = servers["student"]
    for content, status, message in (
        (b"not a picture", 400, "notes.txt: no image, or a damaged one"),
        (b"", 400, "notes.txt: no image, or a damaged one"),
        (bytes(LARGEST_IMAGE + 1), 413, "notes.txt: larger than 32 MiB"),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.ask(QUESTION, content, "notes.txt")
        assert refused.value.code == status
        assert message in json.load(refused.value)["error"]
    picture = (talkers / "picture.png").read_bytes()
    marked = server.ask("is there an <image>", picture)
    assert [(event["model"], "holds <image>" in event["error"]) for event in marked] == [(0, True), (1, True)]
    assert server.ask(QUESTION, picture)[-1]["model"] == 1


def test_a_student_without_its_teacher_answers_alone(talkers: Path, servers: dict[str, Server]) -> None:
    about = servers["orphan"].get("about")
    assert [model["name"] for model in about["models"]] == ["model"]
    assert "its teacher cannot be opened, name one with --against" in about["notice"]
    assert str(talkers / "gone") in about["notice"]
    assert {event["model"] for event in servers["orphan"].ask(QUESTION, (talkers / "picture.png").read_bytes())} == {0}


def panel(talkers: Path, max_new_tokens: int) -> Panel:
    roles = [Role(name, Speaker(str(talkers / name), "cpu")) for name in ("teacher", "student")]
    return Panel(roles, Sampling(max_new_tokens=max_new_tokens))


def test_questions_are_answered_one_after_the_other(talkers: Path) -> None:
    shared, picture, order = panel(talkers, 20), tiny_chat.picture(), []

    async def ask(number: int) -> list[dict[str, Any]]:
        events = []
        async for line in shared.events(picture, QUESTION):
            order.append(number)
            events.append(json.loads(line))
        return events

    async def all_at_once() -> list[list[dict[str, Any]]]:
        return await asyncio.gather(*map(ask, range(3)))

    answers = asyncio.run(all_at_once())
    assert order == sorted(order)
    assert len(order) > 60
    said = [[event for event in events if "piece" in event] for events in answers]
    assert said[0] == said[1] == said[2]


def test_who_leaves_early_does_not_hold_up_the_others(talkers: Path) -> None:
    shared, picture = panel(talkers, 7000), tiny_chat.picture()
    shared.roles[0].speaker.warm_up(shared.sampling)

    async def leave() -> None:
        events = shared.events(picture, QUESTION)
        await anext(events)
        await events.aclose()
        await asyncio.wrap_future(shared.worker.submit(lambda: None))  # whatever was asked before is over

    asyncio.run(leave())
    first, second = [role.speaker.engine.session for role in shared.roles]
    assert first is not None
    assert first.cache.filled < 3000
    assert second is None  # never asked


def test_an_upload_is_seen_as_training_sees_it(talkers: Path) -> None:
    content = (talkers / "picture.png").read_bytes()
    assert as_image(content, "x").tobytes() == tiny_chat.picture().tobytes()


@pytest.mark.parametrize("arguments", [["--port", "{taken}"], ["--host", "203.0.113.7"], ["--port", "99999"]])
def test_a_place_that_is_not_free_is_one_message(
    talkers: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        words = [word.format(taken=listening.getsockname()[1]) for word in arguments]
        assert main(["demo", str(talkers / "student"), *words]) == 1
    message = capsys.readouterr().err
    assert message.startswith("matvlm demo: --host ")
    assert f"{' '.join(words)}" in message
    assert "cannot listen there" in message


def test_a_teacher_that_is_asked_for_has_to_be_there(talkers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(talkers / "student"), "--against", "./nowhere", "--port", "0"]) == 1
    assert "matvlm demo: ./nowhere: " in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    pytest.importorskip("selenium.webdriver", reason="needs selenium, see requirements.txt")
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(headless(tmp_path / "profile", (1100, 900)))
        except FileNotFoundError as error:
            pytest.skip(str(error))
        opened.set_script_timeout(60)
        yield opened


def test_the_page_in_a_browser(talkers: Path, servers: dict[str, Server], browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    def texts(selector: str) -> list[str]:
        return [element.text for element in browser.find_elements("css selector", selector)]

    def wait(condition: Any) -> None:
        WebDriverWait(browser, 60).until(lambda _: condition(), texts("body"))

    browser.get(servers["student"].url)
    wait(lambda: texts(".model h2") == ["Teacher", "Student"])
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    for name in ("broken.png", "picture.png"):
        place = tmp_path if name == "broken.png" else talkers
        browser.find_element("css selector", "input[type=file]").send_keys(str(place / name))
        wait(lambda name=name: browser.find_element("css selector", "label img").get_attribute("alt") == name)
        question = browser.find_element("css selector", "input[type=text]")
        question.clear()
        question.send_keys(f"{QUESTION}\n")
        if name == "broken.png":
            wait(
                lambda: (
                    texts(".message.error")
                    == ["broken.png: no image, or a damaged one: give a PNG, a JPEG or the like"]
                )
            )
            assert texts(".answer") == ["", ""]
    wait(lambda: all(FIGURES.fullmatch(text) for text in texts(".figures")))
    expected = [
        tiny_chat.answer(*matvlm.load(str(talkers / name)), QUESTION, [], TOKENS) for name in ("teacher", "student")
    ]
    assert texts(".answer") == [answer.strip() for answer in expected]
    assert texts(".message") == [""]
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded
    assert all(re.match(rf"{servers['student'].url}/|data:|blob:", name) for name in loaded)
    logged = [entry for entry in browser.get_log("browser") if "400 (Bad Request)" not in entry["message"]]
    assert logged == []


def test_ctrl_c_ends_the_server(talkers: Path, servers: dict[str, Server]) -> None:
    server = servers["orphan"]
    assert server.url
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()

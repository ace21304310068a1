"""Recordings: what was added comes back in order, whatever way the server ended."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from blindtune.errors import TranscriptError
from blindtune.wire import Event, LoraSpec, RecordedModel, Recording, Transcript, TranscriptWriter

RECORDING = Recording(
    operator_id="op", models={"minilm": RecordedModel(source="minilm", dtype="float32", fingerprint="f" * 64)}
)
SPEC = LoraSpec(modules=["layer.0"], rank=2, scaling=0.5)


def event(kind: str = "forward", **fields: object) -> Event:
    base = {"event": 0, "time": 0.0, "tenant": "ann", "kind": kind, "model": "minilm"}
    return Event.model_validate({**base, **fields})


def write(folder: Path, count: int = 3, **options: int) -> TranscriptWriter:
    writer = TranscriptWriter(folder, RECORDING, **options)
    for number in range(count):
        writer.add(event(adapters=["a" * 64]), {"hidden": torch.full((2, 3), float(number))})
    return writer


def test_events_and_tensors_come_back_in_order(tmp_path: Path):
    writer = TranscriptWriter(tmp_path, RECORDING)
    writer.add(event("adapter", adapters=["a" * 64], spec=SPEC), {"weights": torch.arange(5.0)})
    writer.add(event("forward", pooling="mean", seed=7), {"input_ids": torch.ones(2, 3, dtype=torch.int32)})
    writer.add(event("backward", pooling="mean"), {"cotangents": torch.randn(1, 1, 2, 4)})
    writer.close()
    transcript = Transcript(tmp_path)
    assert transcript.recording == RECORDING
    assert [(e.event, e.kind) for e in transcript.events] == [(0, "adapter"), (1, "forward"), (2, "backward")]
    assert transcript.events[0].spec == SPEC
    assert (transcript.events[1].pooling, transcript.events[1].seed) == ("mean", 7)
    assert torch.equal(transcript.tensors(transcript.events[0])["weights"], torch.arange(5.0))
    assert transcript.tensors(transcript.events[1])["input_ids"].dtype == torch.int32


@pytest.mark.parametrize("name", ["Zoë", "two\u2028lines", "tab\tand \x85"])
def test_names_may_hold_any_characters(tmp_path: Path, name: str):
    writer = TranscriptWriter(tmp_path, RECORDING)
    writer.add(event(tenant=name), {"hidden": torch.zeros(1)})
    writer.close()
    assert [e.tenant for e in Transcript(tmp_path).events] == [name]


def test_a_tensor_that_changes_after_it_was_added_is_recorded_as_it_was(tmp_path: Path):
    writer = TranscriptWriter(tmp_path, RECORDING)
    values = torch.zeros(4)
    writer.add(event(), {"hidden": values})
    values += 1
    writer.close()
    transcript = Transcript(tmp_path)
    assert torch.equal(transcript.tensors(transcript.events[0])["hidden"], torch.zeros(4))


def test_many_shards_read_like_one(tmp_path: Path):
    write(tmp_path, 10, flush_bytes=60).close()
    transcript = Transcript(tmp_path)
    assert len({e.shard for e in transcript.events}) == 4
    assert [float(transcript.tensors(e)["hidden"][0, 0]) for e in transcript.events] == list(range(10))


def test_what_was_flushed_survives_a_writer_that_never_closes(tmp_path: Path):
    write(tmp_path, 10, flush_bytes=60)
    assert [e.event for e in Transcript(tmp_path).events] == list(range(9))


def test_a_restarted_server_goes_on_where_the_last_one_stopped(tmp_path: Path):
    write(tmp_path, 2).close()
    write(tmp_path, 3).close()
    transcript = Transcript(tmp_path)
    assert [e.event for e in transcript.events] == [0, 1, 2, 3, 4]
    assert [float(transcript.tensors(e)["hidden"][0, 0]) for e in transcript.events] == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("torn", [b"{", b'{"event": 2, "ti', '{"event": 2, "tenant": "Zo\u00eb'.encode()[:-1]])
def test_a_line_that_a_crash_cut_off_costs_that_event_and_no_other(tmp_path: Path, torn: bytes):
    write(tmp_path, 2).close()
    with (tmp_path / "index.jsonl").open("ab") as index:
        index.write(torn)
    assert [e.event for e in Transcript(tmp_path).events] == [0, 1]
    write(tmp_path, 2).close()
    transcript = Transcript(tmp_path)
    assert [e.event for e in transcript.events] == [0, 1, 2, 3]
    assert [float(transcript.tensors(e)["hidden"][0, 0]) for e in transcript.events] == [0, 1, 0, 1]


def test_a_process_that_is_killed_leaves_a_transcript_that_can_be_read(tmp_path: Path):
    program = (
        "import os, sys, torch; from pathlib import Path; from blindtune.wire import *;"
        "w = TranscriptWriter(Path(sys.argv[1]), Recording(operator_id='op', models={}), flush_bytes=60);"
        "e = Event(event=0, time=0, tenant='ann', kind='forward', model='minilm');"
        "[w.add(e, {'hidden': torch.full((2, 3), float(i))}) for i in range(10)];"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == -9
    transcript = Transcript(tmp_path)
    assert [float(transcript.tensors(e)["hidden"][0, 0]) for e in transcript.events] == list(range(9))


def test_events_from_several_threads_are_numbered_once_each(tmp_path: Path):
    writer = TranscriptWriter(tmp_path, RECORDING, flush_bytes=100)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: writer.add(event(), {"hidden": torch.full((8,), float(i))}), range(64)))
    writer.close()
    transcript = Transcript(tmp_path)
    assert [e.event for e in transcript.events] == list(range(64))
    assert sorted(float(transcript.tensors(e)["hidden"][0]) for e in transcript.events) == list(range(64))


def test_a_folder_that_records_other_models_is_not_mixed_with_ours(tmp_path: Path):
    write(tmp_path, 1).close()
    other = RECORDING.models["minilm"].model_copy(update={"fingerprint": "0" * 64})
    with pytest.raises(TranscriptError, match="records other models") as caught:
        TranscriptWriter(tmp_path, Recording(operator_id="op", models={"minilm": other}))
    assert "empty folder" in caught.value.remedy


def test_a_folder_without_an_index_is_named(tmp_path: Path):
    with pytest.raises(TranscriptError, match=str(tmp_path)) as caught:
        Transcript(tmp_path)
    assert "--record" in caught.value.remedy


@pytest.mark.parametrize("content", ["", "\n", "text\n", "{}\n", json.dumps({"format": 1}) + "\n"])
def test_an_index_that_is_no_transcripts_is_refused(tmp_path: Path, content: str):
    (tmp_path / "index.jsonl").write_text(content)
    with pytest.raises(TranscriptError, match=r"index\.jsonl"):
        Transcript(tmp_path)


def test_a_broken_line_in_the_middle_is_refused_and_not_skipped(tmp_path: Path):
    write(tmp_path, 2).close()
    index = tmp_path / "index.jsonl"
    lines = index.read_text().splitlines()
    index.write_text("\n".join([lines[0], lines[1][:20], lines[2]]) + "\n")
    with pytest.raises(TranscriptError):
        Transcript(tmp_path)

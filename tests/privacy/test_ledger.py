"""The ledger: written before anything is sent, and never below what operators have seen."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from blindtune.errors import BudgetSpent, CheckpointError
from blindtune.privacy.accountant import allowance
from blindtune.privacy.history import LabelHistory, total_mu
from blindtune.privacy.journal import JOURNAL
from blindtune.privacy.ledger import Ledger, Message, read_journal

A, B = "https://a.example", "https://b.example"


def message(*operators: str, brings: float = 0.01, costs: float = 0.005, kind: str = "adapter", **more) -> Message:
    return Message(kind, dict.fromkeys(operators or (A,), costs), brings, **more)


def make(limit: float = math.inf) -> Ledger:
    ledger = Ledger(limit)
    ledger.enlist([A, B])
    return ledger


class TestCounting:
    def test_adds_up_at_each_operator_and_counts_messages_of_a_kind(self):
        ledger = make(allowance(1.0))
        sent = [message(A, B), message(A), message(kind="share")]
        for one in sent:
            ledger.record(one)
        assert len({one.id for one in sent}) == 3
        assert ledger.allowance() == pytest.approx(0.03)
        assert ledger.guarantee().mu == pytest.approx(2 * math.sqrt(0.03))
        assert ledger.used() == pytest.approx(0.5)
        assert (ledger.messages("adapter"), ledger.messages("share"), ledger.seen(B)["adapter"]) == (2, 1, 1)

    def test_charges_equal_messages_as_often_as_they_come(self):
        """Whether two secrets are equal depends on labels; a count that knows it would tell."""
        ledger = make(allowance(1.0))
        for _ in range(3):
            ledger.record(message())
        assert ledger.allowance() == pytest.approx(0.03)

    def test_keeps_what_was_not_needed_for_later(self):
        ledger = make(allowance(1.0))
        ledger.record(message(brings=0.01, costs=0.002))
        assert ledger.room([A], 0.01) == pytest.approx(0.018)
        ledger.record(message(brings=0.01, costs=0.018))
        assert ledger.room([A], 0.01) == pytest.approx(0.01)
        with pytest.raises(ValueError, match="more than there is room for"):
            ledger.record(message(brings=0.01, costs=0.02))

    def test_refuses_a_message_too_many_and_the_reason_depends_on_no_label(self):
        """By what messages bring, which is public; never by what they cost."""
        ledger = make(0.02)
        for _ in range(2):
            ledger.record(message(brings=0.01, costs=0.0))
        with pytest.raises(BudgetSpent, match=r"the budget is 0\.28"):
            ledger.record(message(brings=0.01, costs=0.0))
        ledger.record(message(B))

    def test_the_room_of_a_message_to_two_is_that_of_the_one_with_less(self):
        ledger = make(1.0)
        ledger.record(message(A, brings=0.1, costs=0.1))
        ledger.record(message(B, brings=0.1, costs=0.0))
        assert ledger.room([A, B], 0.0) == pytest.approx(0.0)
        assert ledger.room([B], 0.0) == pytest.approx(0.1)

    def test_nothing_is_guaranteed_once_messages_have_met(self):
        ledger = make()
        ledger.compromise()
        assert ledger.guarantee().epsilon == math.inf

    def test_nobody_is_sent_anything_who_was_not_enlisted(self):
        with pytest.raises(ValueError, match="not enlisted"):
            make().record(message("https://c.example"))

    def test_other_addresses_may_be_new_names_of_any_operator_there_was(self):
        """So all accounts are raised, to the largest allowance and the largest cost; also those of addresses that
        come back."""
        ledger = make(1.0)
        ledger.record(Message("share", {A: 0.1, B: 0.0}, 0.2))
        ledger.record(message(B, brings=0.2, costs=0.05))
        ledger.enlist([A, "https://alias.example"])
        for operator in (A, B, "https://alias.example"):
            assert ledger.room([operator], 0.0) == pytest.approx(0.4 - 0.1)
        ledger.record(message("https://alias.example", brings=0.1, costs=0.0))
        ledger.enlist([A, B])
        assert ledger.room([A], 0.0) == pytest.approx(0.5 - 0.1)
        before = ledger.allowance()
        ledger.enlist([B, A])
        assert ledger.allowance() == before, "the same ones in another order"


class TestJournal:
    def test_holds_a_message_before_it_could_be_sent(self, tmp_path, monkeypatch):
        """If it can't be written, nothing is counted and the caller never sends."""
        ledger = make(1.0)
        ledger.attach(tmp_path)
        sent = message()
        ledger.record(sent)
        assert f'"id": "{sent.id}"' in (tmp_path / JOURNAL).read_text()

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(CheckpointError, match=r"ledger\.jsonl can't be written: .*No space left"):
            ledger.record(message())
        assert ledger.messages("adapter") == 1

    def test_has_nothing_of_a_line_that_was_cut_by_a_full_disk(self, tmp_path, monkeypatch):
        ledger = make(1.0)
        ledger.attach(tmp_path)
        before, write = (tmp_path / JOURNAL).read_bytes(), os.write
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:20]))
            with pytest.raises(CheckpointError, match="the disk is full"):
                ledger.record(message())
        assert (tmp_path / JOURNAL).read_bytes() == before
        ledger.record(message())
        assert read_journal(tmp_path / JOURNAL).messages("adapter") == 1

    def test_is_on_the_disk_and_not_in_a_buffer(self, tmp_path, monkeypatch):
        synced: list[int] = []
        original = os.fsync
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(descriptor) or original(descriptor))
        ledger = make(1.0)
        ledger.attach(tmp_path)
        before = len(synced)
        ledger.record(message(A, B))
        assert len(synced) == before + 1

    def test_is_for_its_owner_alone(self, tmp_path):
        make(1.0).attach(tmp_path)
        assert stat.S_IMODE((tmp_path / JOURNAL).stat().st_mode) == 0o600

    def test_goes_on_after_a_crash_that_cut_off_its_last_line(self, tmp_path):
        ledger = make(1.0)
        ledger.attach(tmp_path)
        ledger.record(message(A, B))
        with (tmp_path / JOURNAL).open("ab") as file:
            file.write(b'{"kind": "adapter", "costs": {"https://a.exam')
        assert read_journal(tmp_path / JOURNAL).messages("adapter") == 1
        assert (tmp_path / JOURNAL).read_bytes().endswith(b"a.exam"), "to look at it changes nothing"
        again = Ledger(1.0)
        again.resume(tmp_path)
        assert (again.run, again.allowance()) == (ledger.run, ledger.allowance())
        again.enlist([A, B])
        again.record(message())
        assert read_journal(tmp_path / JOURNAL).messages("adapter") == 2

    @pytest.mark.parametrize(
        "content",
        [
            '{"format": 5, "run": "r"}\nnonsense\n',
            '{"format": 5, "run": "r"}\n{"kind": "share", "costs": {}}\n',
            "[]\n",
        ],
    )
    def test_that_is_damaged_is_refused(self, tmp_path, content):
        (tmp_path / JOURNAL).write_text(content)
        with pytest.raises(CheckpointError, match="is damaged"):
            Ledger().resume(tmp_path)

    def test_that_is_gone_is_missed(self, tmp_path):
        with pytest.raises(CheckpointError, match="nobody knows what operators have seen"):
            Ledger().resume(tmp_path)

    def test_of_an_earlier_run_in_the_same_folder_is_set_aside(self, tmp_path):
        first, second = make(1.0), make(1.0)
        first.attach(tmp_path)
        first.record(message())
        second.attach(tmp_path)
        assert read_journal(tmp_path / f"ledger-{first.run}.jsonl").messages("adapter") == 1
        assert read_journal(tmp_path / JOURNAL).run == second.run

    def test_has_what_was_counted_before_it_was_there_and_follows_to_a_second_folder(self, tmp_path):
        ledger = make(1.0)
        ledger.record(message())
        for name in "ab":
            ledger.attach(tmp_path / name)
        ledger.record(message())
        ledger.compromise()
        for name in "ab":
            found = read_journal(tmp_path / name / JOURNAL)
            assert (found.messages("adapter"), found.compromised) == (2, True)


class TestCopiesOfARun:
    """Checkpoints beside each other, processes, threads: on one machine they are one account."""

    def start(self, tmp_path) -> Ledger:
        ledger = Ledger(allowance(1.0))
        ledger.follow(tmp_path / "home")
        ledger.attach(tmp_path / "out")
        ledger.enlist([A, B])
        ledger.record(message(A, B))
        return ledger

    def again(self, tmp_path, folder: str) -> Ledger:
        ledger = Ledger(allowance(1.0))
        ledger.follow(tmp_path / "home")
        ledger.resume(tmp_path / folder)
        ledger.enlist([A, B])
        return ledger

    def test_an_earlier_checkpoint_counts_what_was_sent_after_it(self, tmp_path):
        ledger = self.start(tmp_path)
        shutil.copytree(tmp_path / "out", tmp_path / "best")
        ledger.record(message(A, B))
        best = self.again(tmp_path, "best")
        assert best.messages("adapter") == 2
        best.record(message(A, B))
        ledger.record(message(A, B))
        for folder in ("out", "best"):
            assert self.again(tmp_path, folder).messages("adapter") == 4
        assert read_journal(tmp_path / "best" / JOURNAL).allowance() == pytest.approx(0.04)

    def test_the_budget_is_one_for_all(self, tmp_path):
        ledger = Ledger(0.02)
        ledger.follow(tmp_path / "home")
        ledger.attach(tmp_path / "out")
        ledger.enlist([A, B])
        copy = self.again(tmp_path, "out")
        copy.limit = 0.02
        ledger.record(message())
        copy.record(message())
        with pytest.raises(BudgetSpent):
            ledger.record(message())
        assert ledger.room([A], 0.0) == copy.room([A], 0.0)

    def test_a_checkpoint_that_was_away_brings_what_it_sent_there(self, tmp_path):
        """Copied to another machine, where it goes on, and back, while the run went on here too."""
        ledger = self.start(tmp_path)
        shutil.copytree(tmp_path / "out", tmp_path / "there")
        there = Ledger(allowance(1.0))
        there.follow(tmp_path / "another home")
        there.resume(tmp_path / "there")
        there.enlist(["https://c.example"])
        there.record(message("https://c.example", brings=0.05))
        ledger.record(message(A, B, brings=0.02))
        back = self.again(tmp_path, "there")
        assert (back.messages("adapter"), back.seen("https://c.example")["adapter"]) == (2, 1)
        assert back.allowance() == pytest.approx(0.01 + 0.02 + 0.05), "C may be a new name of A"
        ledger.record(message(A, B, brings=0.0))
        assert ledger.messages("adapter") == 3
        assert ledger.seen("https://c.example")["adapter"] == 1

    @pytest.mark.parametrize("restarted", ["here", "there"])
    def test_two_histories_are_counted_on_top_of_each_other(self, tmp_path, restarted):
        """A run went on here and elsewhere, at one of them after its servers had new names: one server saw both."""
        new = [f"{A} 2", f"{B} 2"]
        ledger = self.start(tmp_path)
        shutil.copytree(tmp_path / "out", tmp_path / "there")
        there = Ledger(allowance(1.0))
        there.follow(tmp_path / "another home")
        there.resume(tmp_path / "there")
        for which, place in ((there, "there"), (ledger, "here")):
            names = new if place == restarted else [A, B]
            which.enlist(names)
            which.record(message(*names, brings=0.05))
        back = self.again(tmp_path, "there")
        assert back.allowance() >= 0.01 + 0.05 + 0.05 - 1e-12
        for folder in ("out", "there"):
            assert self.again(tmp_path, folder).allowance() >= 0.11 - 1e-12
        back.enlist(new)
        for folder in ("out", "there"):
            found = read_journal(tmp_path / folder / JOURNAL)
            if folder == "there":
                assert found.allowance() >= 0.11 - 1e-12, "the folder alone is enough on another machine"

    def test_a_home_that_was_taken_away_gets_everything_again(self, tmp_path):
        ledger = self.start(tmp_path)
        shutil.rmtree(tmp_path / "home")
        ledger.record(message(A, B))
        copy = self.again(tmp_path, "out")
        shutil.rmtree(tmp_path / "home")
        copy.record(message(A, B))
        ledger.record(message(A, B))
        assert read_journal(next((tmp_path / "home").glob("*.jsonl"))).messages("adapter") == 4
        assert self.again(tmp_path, "out").messages("adapter") == 4

    def test_a_folder_that_was_taken_away_gets_everything_again(self, tmp_path):
        ledger = self.start(tmp_path)
        shutil.rmtree(tmp_path / "out")
        ledger.attach(tmp_path / "out")
        ledger.record(message(A, B))
        assert read_journal(tmp_path / "out" / JOURNAL).messages("adapter") == 2

    def test_a_folder_that_can_not_be_written_is_not_forgotten(self, tmp_path):
        ledger = self.start(tmp_path)
        copy = self.again(tmp_path, "out")
        copy.record(message(A, B))
        elsewhere = Ledger(allowance(1.0))
        elsewhere.follow(tmp_path / "home")
        elsewhere.resume(tmp_path / "out")
        elsewhere.attach(tmp_path / "second")
        copy.record(message(A, B))
        (tmp_path / "second" / JOURNAL).rename(tmp_path / "second" / "away")
        (tmp_path / "second" / JOURNAL).mkdir()
        with pytest.raises(CheckpointError, match="can't be written"):
            elsewhere.enlist([A, B])
        (tmp_path / "second" / JOURNAL).rmdir()
        (tmp_path / "second" / "away").rename(tmp_path / "second" / JOURNAL)
        elsewhere.record(message(A, B))
        assert read_journal(tmp_path / "second" / JOURNAL).messages("adapter") == 4
        ledger.record(message(A, B))

    @pytest.mark.parametrize("others", [0, 1, 2])
    def test_a_home_that_another_took_the_place_of_is_joined(self, tmp_path, others):
        """Shorter, as long or longer than what was read of the one before."""
        ledger = self.start(tmp_path)
        shutil.rmtree(tmp_path / "home")
        shutil.copytree(tmp_path / "out", tmp_path / "best")
        ledger.journals.clear()
        ledger.record(message(A, B, brings=0.03))
        shutil.rmtree(tmp_path / "home")
        copy = self.again(tmp_path, "best")
        for _ in range(others):
            copy.record(message(A, B))
        ledger.record(message(A, B))
        copy.record(message(A, B))
        for found in (ledger, copy, self.again(tmp_path, "best")):
            with found.exclusive():
                assert found.allowance() >= 0.01 + 0.03 + 0.01 * (others + 2) - 1e-12

    def test_a_folder_that_comes_back_while_the_run_goes_on_is_known_everywhere(self, tmp_path):
        ledger = self.start(tmp_path)
        shutil.copytree(tmp_path / "out", tmp_path / "there")
        there = Ledger(allowance(1.0))
        there.follow(tmp_path / "another home")
        there.resume(tmp_path / "there")
        there.enlist([A, B])
        there.record(message(A, B, brings=0.05))
        ledger.attach(tmp_path / "there")
        for folder in ("out", "there"):
            assert self.again(tmp_path, folder).allowance() >= 0.06 - 1e-12

    def test_two_runs_that_save_to_one_folder_in_turn_never_have_each_others_ledger(self, tmp_path):
        first = self.start(tmp_path)
        second = Ledger(allowance(1.0))
        second.follow(tmp_path / "home")
        second.enlist([A, B])
        for ledger in (first, second, first):
            ledger.attach(tmp_path / "best")
            ledger.record(message(A, B))
            assert read_journal(tmp_path / "best" / JOURNAL).run == ledger.run
        second.record(message(A, B))
        found = read_journal(tmp_path / "best" / JOURNAL)
        assert (found.run, found.messages("adapter")) == (first.run, 3)
        assert second.messages("adapter") == 2

    def test_a_folder_that_was_removed_stops_nothing(self, tmp_path):
        """Such as an old checkpoint. The run's journal on this machine has it all."""
        ledger = self.start(tmp_path)
        ledger.attach(tmp_path / "old")
        copy = self.again(tmp_path, "out")
        copy.record(message(A, B))
        shutil.rmtree(tmp_path / "old")
        ledger.record(message(A, B))
        (tmp_path / "out" / JOURNAL).unlink()
        copy.record(message(A, B))
        ledger.record(message(A, B))
        assert self.again(tmp_path, "out").messages("adapter") == 5

    def test_one_folder_under_several_homes_adds_up_what_servers_were_sent_under_several_names(self, tmp_path):
        """Two containers with one mounted folder: neither reads what the other writes in between."""
        ledgers = []
        for home in range(3):
            ledger = Ledger(allowance(1.0))
            ledger.follow(tmp_path / f"home{home}")
            if ledgers:
                ledger.resume(tmp_path / "out")
            else:
                ledger.attach(tmp_path / "out")
            ledger.enlist([f"{A} {home}", f"{B} {home}"])
            ledgers.append(ledger)
        for turn in range(6):
            ledgers[turn % 3].record(message(f"{A} {turn % 3}", f"{B} {turn % 3}"))
        assert read_journal(tmp_path / "out" / JOURNAL).allowance() >= 0.06 - 1e-12
        for home in range(4):
            again = Ledger(allowance(1.0))
            again.follow(tmp_path / f"home{home}")
            again.resume(tmp_path / "out")
            assert again.allowance() >= 0.06 - 1e-12

    def test_what_two_copies_spent_of_the_same_room_breaks_nothing_off(self, tmp_path):
        """Whether there is room left depends on labels; an error would show it."""
        first = Ledger(allowance(1.0))
        first.follow(tmp_path / "one")
        first.attach(tmp_path / "out")
        first.enlist([A, B])
        for _ in range(4):
            first.record(message(A, B, costs=0.0))
        shutil.copytree(tmp_path / "out", tmp_path / "copy")
        other = Ledger(allowance(1.0))
        other.follow(tmp_path / "two")
        other.resume(tmp_path / "copy")
        other.enlist([A, B])
        for ledger in (first, other):
            ledger.record(message(A, B, costs=ledger.room([A, B], 0.01)))
        back = Ledger(allowance(1.0))
        back.follow(tmp_path / "one")
        back.resume(tmp_path / "copy")
        back.enlist([A, B])
        assert back.room([A, B], 0.01) < 0
        for ledger in (back, first):
            ledger.record(message(A, B, costs=0.0))
            ledger.record(Message("check", {A: 0.0}))
            with pytest.raises(ValueError, match="more than there is room for"):
                ledger.record(message(A, B, costs=0.001))

    def test_the_journal_of_another_run_is_refused(self, tmp_path):
        """A run that was begun in the folder, and broken off at once, has set the first one's journal aside."""
        first, second = Ledger(1.0), Ledger(1.0)
        first.attach(tmp_path)
        second.attach(tmp_path)
        with pytest.raises(CheckpointError, match="of another run") as refused:
            Ledger(1.0).resume(tmp_path, first.run)
        assert f"ledger-{first.run}.jsonl" in refused.value.remedy
        Ledger(1.0).resume(tmp_path, second.run)

    def test_journals_that_were_set_aside_count_too(self, tmp_path):
        """Two other runs came and went; each time what this one had counted was set aside."""
        run = Ledger(1.0)
        run.enlist([A, B])
        for _ in range(2):
            run.attach(tmp_path)
            run.record(message(A, B))
            Ledger(1.0).attach(tmp_path)
        aside = tmp_path / f"ledger-{run.run}.jsonl"
        assert read_journal(aside).messages("adapter") == 1
        shutil.copy(aside, tmp_path / JOURNAL)
        again = Ledger(1.0)
        again.resume(tmp_path, run.run)
        assert again.messages("adapter") == 2

    def test_a_home_stays_where_it_is(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("BLINDTUNE_HOME", "home")
        first = LabelHistory().home
        monkeypatch.chdir(tmp_path.parent)
        assert first == tmp_path / "home" / "runs"

    def test_a_process_that_was_forked_while_a_line_was_written_blocks_nobody(self, tmp_path, monkeypatch):
        """It holds the file open, as long as it runs."""
        ledger = Ledger(1.0)
        ledger.attach(tmp_path)
        ledger.enlist([A, B])
        open_too: list[int] = []
        synced = os.fsync
        monkeypatch.setattr(os, "fsync", lambda descriptor: (open_too.append(os.dup(descriptor)), synced(descriptor)))
        ledger.record(message(A, B))
        monkeypatch.undo()
        with ThreadPoolExecutor(1) as threads:
            threads.submit(ledger.record, message(A, B)).result(timeout=10)
        for descriptor in open_too:
            os.close(descriptor)

    def test_a_journal_of_another_version_is_named_so(self, tmp_path):
        (tmp_path / JOURNAL).write_text('{"format": 3, "run": "x"}\n')
        with pytest.raises(CheckpointError, match="another version"):
            Ledger(1.0).resume(tmp_path)

    @pytest.mark.parametrize("operators", [2, 9])
    @pytest.mark.parametrize("restored", [True, False])
    def test_a_journal_that_was_put_back_is_noticed_whatever_its_length(self, tmp_path, restored, operators):
        def opened(folder: str, how: str) -> Ledger:
            ledger = Ledger(0.041)
            ledger.follow(tmp_path / "home")
            getattr(ledger, how)(tmp_path / folder)
            ledger.enlist([A, B, *(f"https://{number:060}.example" for number in range(operators - 2))])
            return ledger

        first = opened("out", "attach")
        first.record(message(A, B))
        shutil.copytree(tmp_path / "out", tmp_path / "best")
        shutil.copytree(tmp_path / "home", tmp_path / "backup")
        first.record(message(A, B))
        if restored:
            shutil.copy(tmp_path / "backup" / f"{first.run}.jsonl", tmp_path / "home")
        else:
            shutil.rmtree(tmp_path / "home")
        opened("best", "resume").record(message(A, B))
        first.record(message(A, B))
        with pytest.raises(BudgetSpent):
            first.record(message(A, B))

    def test_half_a_line_is_cut_off_before_the_next_one(self, tmp_path):
        ledger = Ledger(1.0)
        ledger.follow(tmp_path / "home")
        ledger.attach(tmp_path / "out")
        ledger.enlist([A, B])
        path = tmp_path / "out" / JOURNAL
        with path.open("a") as file:
            file.write('{"kind": "adap')
        ledger.record(message(A, B))
        assert read_journal(path).messages("adapter") == 1

    def test_pairs_of_a_larger_pool_are_counted_each_for_itself(self, tmp_path):
        """The lines of one process alone raise nothing."""
        names = [f"https://{letter}.example" for letter in "abcd"]
        ledger = Ledger(1.0)
        ledger.attach(tmp_path)
        ledger.enlist(names)
        for first in (0, 2, 0):
            ledger.record(message(*names[first : first + 2]))
        for found in (ledger, read_journal(tmp_path / JOURNAL)):
            assert found.allowance() == pytest.approx(0.02)

    @pytest.mark.parametrize("seed", [*range(20), 48, 52])
    def test_no_order_of_copies_and_meetings_loses_anything(self, tmp_path, seed):
        """Forks on two machines, with servers that are restarted now and then: no ledger, and no file, says less than
        one server was sent by messages that it knows."""
        chance, truth = random.Random(seed), {}
        live, folders = [(self.start(tmp_path), 1)], [tmp_path / "out"]
        for number in range(25):
            act = chance.random()
            if act < 0.55:
                place = chance.randrange(len(live))
                ledger, names = live[place][0], chance.choice([live[place][1], chance.randint(1, 4)])
                live[place] = (ledger, names)
                operators = [f"{A} {names}", f"{B} {names}"]
                sent = message(*chance.choice([operators, operators[:1], operators[1:]]))
                with ledger.exclusive():
                    ledger.enlist(operators)
                    ledger.record(sent)
                truth[sent.id] = {name.split(" ")[0] for name in sent.costs}
                continue
            folder = chance.choice(folders)
            if act < 0.8:
                shutil.copytree(folder, tmp_path / str(number))
                folder = tmp_path / str(number)
                folders.append(folder)
            ledger = Ledger(9.0)
            ledger.follow(tmp_path / chance.choice(["home", "another home"]))
            ledger.resume(folder)
            live.append((ledger, chance.randint(1, 4)))
        for ledger in [*(found for found, _ in live), *(read_journal(folder / JOURNAL) for folder in folders)]:
            with ledger.exclusive():
                known = [truth[name] for name in ledger._lines if name in truth]
            assert ledger.allowance() >= 0.01 * max(sum(url in urls for urls in known) for url in (A, B)) - 1e-9

    def test_a_journal_of_the_same_run_is_taken_over_and_not_set_aside(self, tmp_path):
        ledger = self.start(tmp_path)
        shutil.copytree(tmp_path / "out", tmp_path / "best")
        best = Ledger(allowance(1.0))
        best.resume(tmp_path / "best")
        best.enlist([A, B])
        best.record(message(A, B))
        best.attach(tmp_path / "out")
        assert read_journal(tmp_path / "out" / JOURNAL).messages("adapter") == 2
        assert [path.name for path in (tmp_path / "out").iterdir()] == [JOURNAL]
        assert self.again(tmp_path, "out").messages("adapter") == 2
        ledger.record(message(A, B))

    def test_journals_that_are_set_aside_never_take_each_others_place(self, tmp_path):
        first = make(1.0)
        first.attach(tmp_path)
        old = (tmp_path / JOURNAL).read_bytes()
        for _ in range(2):
            make(1.0).attach(tmp_path)
            (tmp_path / JOURNAL).write_bytes(old)
        make(1.0).attach(tmp_path)
        assert len(list(tmp_path.glob(f"ledger-{first.run}*.jsonl"))) == 3

    def test_threads_and_copies_never_spend_the_same_room(self, tmp_path):
        """Each looks at the room and takes all of it, in several threads and two copies: nobody takes too much."""
        ledger = self.start(tmp_path)
        copy = self.again(tmp_path, "out")

        def spend(which: Ledger) -> None:
            for _ in range(20):
                with which.exclusive():
                    room = which.room([A, B], 0.001)
                    which.record(message(A, B, brings=0.001, costs=room))

        with ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(spend, which) for which in (ledger, copy, ledger, copy)]:
                done.result()
        found = read_journal(tmp_path / "out" / JOURNAL)
        assert found.messages("adapter") == 81
        assert found.used() == pytest.approx(1.0)

    def test_the_copy_that_was_cut_off_while_writing_is_mended(self, tmp_path):
        self.start(tmp_path)
        journal = next((tmp_path / "home").glob("*.jsonl"))
        with journal.open("ab") as file:
            file.write(b'{"kind": "adapter", "costs"')
        again = self.again(tmp_path, "out")
        again.record(message(A, B))
        assert read_journal(journal).messages("adapter") == 2


class TestHistory:
    def texts(self, *numbers: int) -> list[str]:
        return [f"note {number}" for number in numbers]

    def test_adds_up_runs_that_share_a_text(self, tmp_path):
        history, ledgers = LabelHistory(tmp_path / "home"), []
        for texts in (self.texts(1, 2, 3), self.texts(3, 4), self.texts(5)):
            ledger = make(allowance(0.5))
            ledger.follow(history.home)
            history.register(ledger.run, 0.5, texts)
            ledger.record(message(brings=allowance(0.3)))
            ledgers.append(ledger)
        found = history.earlier(self.texts(2, 3), but=ledgers[1].run)
        assert [(run.run, run.shared) for run in found] == [(ledgers[0].run, 2)]
        assert found[0].mu == pytest.approx(0.3), "what was really sent, from that run's ledger"
        assert len(history.earlier(self.texts(2, 3))) == 2
        assert total_mu(found, 0.4) == pytest.approx(0.5)

    def test_knows_all_texts_of_a_run_that_goes_on_with_others(self, tmp_path):
        history = LabelHistory(tmp_path / "home")
        for number in (1, 2):
            history.register("r", 0.5, self.texts(number))
        assert [run.shared for run in history.earlier(self.texts(1, 2, 3))] == [2]

    def test_counts_the_whole_budget_of_a_run_whose_ledger_is_gone(self, tmp_path):
        history = LabelHistory(tmp_path / "home")
        history.register("r1", 0.7, self.texts(1))
        history.register("r2", math.inf, self.texts(1))
        assert sorted(run.mu for run in history.earlier(self.texts(1))) == [0.7, math.inf]

    def test_takes_nothing_of_the_ledger_of_a_run_whose_adapters_travel_in_the_clear(self, tmp_path):
        """It counts shares alone."""
        history, ledger = LabelHistory(tmp_path / "home"), make()
        ledger.follow(history.home)
        history.register(ledger.run, math.inf, self.texts(1))
        ledger.record(message(kind="share", brings=allowance(0.2)))
        assert history.earlier(self.texts(1))[0].mu == math.inf

    def test_knows_pairs_of_texts_and_holds_no_text(self, tmp_path):
        history = LabelHistory(tmp_path / "home")
        history.register("r", 0.5, [("one", "two"), "three"])
        assert len(history.earlier([("one", "two")])) == 1
        assert history.earlier([("one", "three"), "one"]) == []
        written = b"".join(path.read_bytes() for path in (tmp_path / "home").iterdir())
        assert b"three" not in written
        assert json.loads((tmp_path / "home" / "r.json").read_text())["budget"] == 0.5

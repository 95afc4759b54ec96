"""Facts of an epoch in, findings out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from nat_plugin_evsys.report.diagnosis import EpochFacts, diagnose, one_answer
from nat_plugin_evsys.report.findings import Finding, FindingId, finding_text, findings_of, quoted
from nat_plugin_evsys.report.replies import Reply, ReplyNumbers

TEAMS = ("network", "printing", "accounts", "payroll")


def reply(row: int, text: str, reward: float | None, **changes: object) -> Reply:
    """A reply to one of the rows, which ask for different teams in turn."""
    made = Reply(
        row=f"row-{row}",
        question=f"Question {row}?",
        expected=TEAMS[row % 4],
        text=text,
        reward=reward,
        verdict="mode: exact",
        tokens=10,
        calls=1,
        cut=0,
    )
    return replace(made, **changes)


HEALTHY = [reply(row, team, float(team == TEAMS[row % 4])) for row in range(4) for team in TEAMS]
"""Four rows, four attempts at each, one of them right."""

ALL_WRONG = [replace(each, reward=0.0) for each in HEALTHY]

LISTING = [
    reply(row, text, 1.0)
    for row in range(4)
    for text in ("network, printing, accounts, payroll", "payroll accounts network printing!")
]

SILENT = [replace(each, text="", tokens=1, reward=1.0 if each.row == "row-0" else each.reward) for each in HEALTHY]


SEVERAL = [
    *HEALTHY,
    reply(0, "Printing the network logs.", 1.0),
    reply(1, "The network, or printing?", 1.0),
]
"""Two of six rewarded replies name another team too."""


def found(facts: EpochFacts) -> dict[FindingId, Finding]:
    return {finding.id: finding for finding in diagnose(facts)}


def numbers(replies: Sequence[Reply] = HEALTHY, **changes: object) -> ReplyNumbers:
    return replace(ReplyNumbers.of(replies), **changes)


def test_a_healthy_epoch_has_no_finding() -> None:
    assert diagnose(EpochFacts(1, HEALTHY, trained=16)) == []
    assert diagnose(EpochFacts(5, HEALTHY, trained=16, heldout=HEALTHY[::5], before=[numbers()] * 4)) == []


def test_the_numbers_of_an_epoch() -> None:
    lost = reply(7, "", None, verdict="the judge is gone", cut=1)
    assert ReplyNumbers.of([*HEALTHY, lost, reply(8, " \n", 0.0)]) == ReplyNumbers(
        replies=17,
        rows=5,
        rows_with_signal=4,
        reward_mean=4 / 17,
        reward_min=0.0,
        reward_max=1.0,
        tokens_mean=10.0,
        calls=18,
        cut=1,
        empty=1,
        reward_std=pytest.approx((4 / 17 * 13 / 17) ** 0.5),
    )
    row = {"replies": json.loads(json.dumps(numbers().to_dict()))}
    assert ReplyNumbers.of_row(row) == numbers()
    assert ReplyNumbers.of_row({}) is None


class TestSameReward:
    def test_is_said_with_three_different_replies_and_what_the_evaluator_said(self) -> None:
        finding = found(EpochFacts(1, ALL_WRONG, trained=0))[FindingId.SAME_REWARD]
        assert finding.sentence == (
            "Every reward of epoch 1 is 0.000 (16 replies to 4 rows), so no reply is better than another and nothing "
            "was trained."
        )
        assert [(example.row, example.text) for example in finding.examples] == [
            ("row-0", "network"),
            ("row-0", "printing"),
            ("row-0", "accounts"),
        ]
        text = finding_text(finding)
        assert text.splitlines()[0].startswith("! Every reward of epoch 1 is 0.000")
        assert 'row row-0 asks "Question 0?" and wants "network"' in text
        assert 'reply "accounts": reward 0.000, mode: exact' in text

    def test_is_the_only_finding_as_long_as_it_holds(self) -> None:
        facts = EpochFacts(2, ALL_WRONG, trained=0, before=[numbers(ALL_WRONG)])
        assert [finding.id for finding in diagnose(facts)] == [FindingId.SAME_REWARD]

    def test_one_other_reward_in_an_earlier_epoch_ends_it(self) -> None:
        facts = EpochFacts(2, ALL_WRONG, trained=0, before=[numbers()], last_trained=1)
        assert FindingId.SAME_REWARD not in found(facts)
        assert FindingId.NO_SIGNAL in found(facts)

    def test_a_single_reply_is_no_pattern(self) -> None:
        assert diagnose(EpochFacts(1, [reply(0, "network", 1.0)], trained=0)) == []

    def test_without_any_reward_nothing_is_claimed(self) -> None:
        assert diagnose(EpochFacts(1, [reply(row, "", None) for row in range(4)], trained=0)) == []


class TestNoSignal:
    def test_names_the_last_epoch_that_trained_and_the_one_answer(self) -> None:
        replies = [reply(row, "network", float(row == 0)) for row in range(4) for _ in range(4)]
        facts = EpochFacts(5, replies, trained=0, before=[numbers()] * 4, last_trained=3)
        finding = found(facts)[FindingId.NO_SIGNAL]
        assert "Epoch 5 trained nothing: every group has lost its signal after epoch 3" in finding.sentence
        assert 'The policy gives one answer to every row: "network".' in finding.sentence
        assert "learning_rate" in finding.advice

    def test_is_a_collapse_only_where_an_earlier_epoch_was_better_beyond_luck(self) -> None:
        replies = [reply(row, TEAMS[(row + row % 4) % 4], float(row == 0)) for row in range(4) for _ in range(4)]
        for mean, expected in ((0.8, True), (0.3, False), (0.2, False)):
            facts = EpochFacts(5, replies, trained=0, before=[numbers(reward_mean=mean)], last_trained=4)
            assert found(facts)[FindingId.NO_SIGNAL].collapse is expected
        facts = EpochFacts(5, replies, trained=0, before=[numbers(reward_mean=0.3)])
        assert not found(facts)[FindingId.NO_SIGNAL].collapse

    def test_one_answer_to_each_row(self) -> None:
        replies = [reply(row, TEAMS[(row + (row == 3)) % 4], float(row != 3)) for row in range(4) for _ in range(4)]
        finding = found(EpochFacts(5, replies, trained=0, before=[numbers()], last_trained=4))[FindingId.NO_SIGNAL]
        assert "The policy gives each row one answer." in finding.sentence

    def test_a_run_that_has_learned_all_there_is_is_told_so(self) -> None:
        replies = [reply(row, TEAMS[row], 1.0) for row in range(4) for _ in range(4)]
        finding = found(EpochFacts(5, replies, trained=0, before=[numbers()], last_trained=4))[FindingId.NO_SIGNAL]
        assert "more epochs on these rows change nothing" in finding.advice

    def test_a_run_that_never_had_a_signal_is_not_told_that_it_lost_one(self) -> None:
        replies = [reply(row, "network", float(row == 0)) for row in range(4) for _ in range(4)]
        finding = found(EpochFacts(1, replies, trained=0))[FindingId.NO_SIGNAL]
        assert "lost" not in finding.sentence
        assert "temperature" in finding.advice

    def test_one_group_with_a_signal_is_enough(self) -> None:
        replies = [replace(each, reward=0.0) for each in HEALTHY[:-4]] + HEALTHY[-4:]
        assert FindingId.NO_SIGNAL not in found(EpochFacts(2, replies, trained=0, before=[numbers()]))


class TestOneAnswer:
    def test_a_list_of_all_answers_is_found_in_any_order(self) -> None:
        finding = found(EpochFacts(3, LISTING, trained=4, before=[numbers()]))[FindingId.ONE_ANSWER]
        assert finding.sentence == (
            "8 of 8 replies of epoch 3 give the same answer to 4 different rows: "
            '"network, printing, accounts, payroll". It earns 1.000 on average.'
        )
        assert "can be won without reading the row" in finding.advice

    def test_held_out_rows_show_it_first(self) -> None:
        finding = found(EpochFacts(1, HEALTHY, trained=4, heldout=LISTING))[FindingId.ONE_ANSWER]
        assert "to held-out rows" in finding.sentence

    def test_a_greedy_policy_that_is_still_unsure_is_left_alone(self) -> None:
        heldout = [reply(row, "network", float(row % 4 == 0)) for row in range(8)]
        assert diagnose(EpochFacts(1, HEALTHY, trained=4, heldout=heldout)) == []

    def test_a_collapse_is_no_success(self) -> None:
        replies = [reply(row, "network", float(row % 4 == 0)) for row in range(8) for _ in range(2)]
        finding = found(EpochFacts(3, replies, trained=4, before=[numbers()]))[FindingId.ONE_ANSWER]
        assert "The policy has collapsed" in finding.advice
        assert not finding.collapse, "no epoch was better"
        facts = EpochFacts(3, replies, trained=4, before=[numbers(reward_mean=0.4)])
        assert found(facts)[FindingId.ONE_ANSWER].collapse

    def test_a_list_that_wins_is_no_collapse(self) -> None:
        facts = EpochFacts(3, LISTING, trained=4, before=[numbers(reward_mean=1.0, rows_with_signal=0)])
        assert not found(facts)[FindingId.ONE_ANSWER].collapse

    @pytest.mark.parametrize(
        "replies",
        [
            pytest.param([replace(each, expected="all") for each in LISTING], id="all rows want the same"),
            pytest.param(LISTING[:4], id="too few rows"),
            pytest.param(HEALTHY, id="different answers"),
            pytest.param([replace(each, text="") for each in LISTING], id="nothing said"),
            pytest.param(
                [reply(row, f"The team that should look at this ticket is {TEAMS[row % 4]}.", 1.0) for row in range(8)],
                id="the same sentence but for the answer",
            ),
        ],
    )
    def test_what_is_not_one_answer(self, replies: list[Reply]) -> None:
        assert one_answer(replies) is None

    def test_rows_without_a_wanted_answer_may_have_it(self) -> None:
        answer = one_answer([replace(each, expected=None) for each in LISTING])
        assert answer is not None
        assert len(answer[1]) == 8

    def test_one_in_ten_may_differ(self) -> None:
        replies = [reply(row, "network", 1.0) for row in range(20)]
        replies[3] = replace(replies[3], text="printing")
        answer = one_answer(replies)
        assert answer is not None
        assert len(answer[1]) == 19
        assert one_answer([*replies, *(reply(row, "payroll", 1.0) for row in range(2))]) is None


def test_replies_that_end_at_the_token_limit() -> None:
    replies = [replace(each, cut=int(index % 2)) for index, each in enumerate(HEALTHY)]
    finding = found(EpochFacts(1, replies, trained=16))[FindingId.CUT_OFF]
    assert "8 of 16 calls of epoch 1 (50 %) ended at `max_tokens`" in finding.sentence
    assert all(example.cut for example in finding.examples)
    few = [replace(each, cut=int(index < 3)) for index, each in enumerate(HEALTHY)]
    assert diagnose(EpochFacts(1, few, trained=16)) == []


def test_a_policy_that_hardly_tries_alternatives() -> None:
    before = [numbers(), numbers()]
    facts = EpochFacts(3, HEALTHY, trained=16, before=before, entropies=[1.5, 0.4, 0.1])
    assert found(facts)[FindingId.LOW_ENTROPY].sentence == (
        "The policy hardly tries alternatives any more: the entropy of its tokens has fallen from 1.500 to 0.100 nats "
        "while the mean reward is 0.250 (the best reply got 1.000)."
    )
    assert diagnose(replace(facts, entropies=[1.5, 0.4, 0.2])) == []
    assert diagnose(replace(facts, entropies=[0.1])) == []
    solved = [replace(each, reward=1.0, text=each.expected or "") for each in HEALTHY]
    assert FindingId.LOW_ENTROPY not in found(replace(facts, replies=solved))


def test_steps_that_made_the_policy_another_one() -> None:
    metrics = {"kl_moved": 4.1757, "learning_rate": 3e-3, "lr_factor": 0.25}
    finding = found(EpochFacts(3, HEALTHY, trained=16, metrics=metrics))[FindingId.MOVED_FAR]
    assert finding.sentence == (
        "Training on epoch 3 moved the policy by 4.18 nats a token from the one that sampled, at a learning rate of "
        "0.003. The rates of the next steps are multiplied by 0.25 (`lr_factor`)."
    )
    assert "so 0.0005 would have moved it by 0.1" in finding.advice
    assert diagnose(EpochFacts(3, HEALTHY, trained=16, metrics={**metrics, "kl_moved": 0.9})) == []


class TestFallen:
    def test_a_gain_that_is_lost_is_a_collapse(self) -> None:
        before = [numbers(reward_mean=mean) for mean in (0.2, 0.8, 0.7)]
        finding = found(EpochFacts(4, HEALTHY, trained=16, before=before))[FindingId.FALLEN]
        assert finding.sentence == (
            "The reward has fallen from 0.800 in epoch 2 to 0.250 in epoch 4: what was learned is lost."
        )
        assert finding.collapse
        assert Finding.from_dict(json.loads(json.dumps(finding.to_dict()))) == finding

    def test_unsteady_epochs_are_none(self) -> None:
        for before in ((0.1, 0.5), (0.25, 0.3), (0.3, 0.2), (0.25,), ()):
            facts = EpochFacts(len(before) + 1, HEALTHY, trained=16, before=[numbers(reward_mean=m) for m in before])
            assert FindingId.FALLEN not in found(facts), before

    def test_epochs_of_other_rows_are_compared_by_the_pass(self) -> None:
        before = [numbers(reward_mean=mean) for mean in (0.1, 0.3, 0.9, 0.7, 0.1)]
        facts = EpochFacts(6, HEALTHY, trained=16, before=before)
        assert FindingId.FALLEN in found(facts)
        assert FindingId.FALLEN in found(replace(facts, epochs_per_pass=2))  # 0.2 0.6 0.8 0.4 0.175
        assert FindingId.FALLEN not in found(replace(facts, epochs_per_pass=5))  # 0.42 0.45
        finding = found(replace(facts, epochs_per_pass=2))[FindingId.FALLEN]
        assert finding.sentence == (
            "The reward has fallen from 0.800 in epoch 4 to 0.175 in epoch 6 (each the mean of 2 epochs, which visit "
            "every row): what was learned is lost."
        )

    def test_a_fall_within_what_luck_does_is_none(self) -> None:
        before = [replace(numbers(), reward_mean=mean, replies=64) for mean in (0.172, 0.266, 0.297, 0.312, 0.25)]
        now = [replace(each, reward=float(n < 13)) for n, each in enumerate(HEALTHY * 4)]  # 0.203 of 64 replies
        facts = EpochFacts(6, now, trained=16, before=before)
        assert FindingId.FALLEN not in found(facts)
        many = [replace(each, replies=64 * 64) for each in before]
        assert FindingId.FALLEN in found(replace(facts, before=many, replies=now * 64))

    def test_a_policy_that_was_good_from_the_start_can_fall_too(self) -> None:
        before = [replace(numbers(), reward_mean=mean, replies=64) for mean in (0.8, 0.7)]
        worse = [replace(each, reward=float(n < 6)) for n, each in enumerate(HEALTHY * 4)]
        assert found(EpochFacts(3, worse, trained=16, before=before))[FindingId.FALLEN].collapse
        half = [replace(each, reward=float(n < 30)) for n, each in enumerate(HEALTHY * 4)]
        assert FindingId.FALLEN not in found(EpochFacts(3, half, trained=16, before=before))

    def test_a_run_that_reloads_is_not_told_to(self) -> None:
        before = [numbers(reward_mean=mean) for mean in (0.2, 0.8, 0.7)]
        facts = EpochFacts(4, HEALTHY, trained=16, before=before)
        assert "on_collapse" in found(facts)[FindingId.FALLEN].advice
        assert "on_collapse" not in found(replace(facts, can_reload=True))[FindingId.FALLEN].advice

    def test_what_a_reloaded_policy_earns_is_compared_with_what_it_earned_since(self) -> None:
        before = [numbers(reward_mean=mean) for mean in (0.2, 0.5, 0.8, 0.2)]
        facts = EpochFacts(5, HEALTHY, trained=16, before=before, reloaded_after=4)
        assert FindingId.FALLEN not in found(facts)
        again = replace(facts, epoch=7, before=[*before, numbers(reward_mean=0.9), numbers(reward_mean=0.8)])
        assert "from 0.900 in epoch 5 to 0.250 in epoch 7" in found(again)[FindingId.FALLEN].sentence

    def test_a_window_that_reaches_back_over_a_reload_is_not_judged(self) -> None:
        before = [numbers(reward_mean=mean) for mean in (0.2, 0.2, 0.8, 0.8, 0.1)]
        facts = EpochFacts(6, HEALTHY, trained=16, before=before, epochs_per_pass=2)
        assert FindingId.FALLEN in found(facts)
        assert FindingId.FALLEN not in found(replace(facts, reloaded_after=5))
        lost = replace(facts, replies=[reply(row, "network", float(row == 0)) for row in range(8)])
        assert found(lost)[FindingId.ONE_ANSWER].collapse
        assert not found(replace(lost, reloaded_after=5))[FindingId.ONE_ANSWER].collapse

    def test_no_signal_is_said_once_every_row_had_its_turn(self) -> None:
        dull = [replace(each, reward=1.0 if each.row == HEALTHY[0].row else 0.0) for each in HEALTHY]
        facts = EpochFacts(3, dull, trained=0, before=[numbers(), numbers()], last_trained=2)
        assert FindingId.NO_SIGNAL in found(facts)
        assert FindingId.NO_SIGNAL not in found(replace(facts, epochs_per_pass=2))
        assert FindingId.NO_SIGNAL in found(replace(facts, epochs_per_pass=2, last_trained=1))


class TestShrunk:
    def test_more_reward_for_silence(self) -> None:
        facts = EpochFacts(4, SILENT, trained=4, before=[numbers(reward_mean=0.1)])
        sentence = found(facts)[FindingId.SHRUNK].sentence
        assert "The reward rose from 0.100 to 0.438 between epoch 1 and 4" in sentence
        assert "shrank from 10 to 1 tokens, 16 of 16 say nothing at all" in sentence

    def test_more_reward_for_a_fifth_of_the_words(self) -> None:
        short = [replace(each, tokens=10) for each in HEALTHY]
        assert found(EpochFacts(4, short, trained=4, before=[numbers(reward_mean=0.1, tokens_mean=50.0)]))
        assert not found(EpochFacts(4, short, trained=4, before=[numbers(reward_mean=0.1, tokens_mean=49.0)]))

    def test_without_more_reward_it_is_not_what_the_reward_asks_for(self) -> None:
        assert not found(EpochFacts(4, SILENT, trained=4, before=[numbers(reward_mean=0.9)]))


def test_findings_of_a_run_come_once_each_with_their_epochs() -> None:
    [same] = diagnose(EpochFacts(1, ALL_WRONG, trained=0))
    [cut] = diagnose(EpochFacts(2, [replace(each, cut=1) for each in HEALTHY], trained=16))
    rows = [
        {"epoch": 1, "findings": [same.to_dict()]},
        {"epoch": 2, "findings": [cut.to_dict()]},
        {"epoch": 3},
        {"epoch": 4, "findings": [replace(cut, epoch=4, sentence="later").to_dict()]},
    ]
    assert findings_of(json.loads(json.dumps(rows))) == [(same, [1]), (cut, [2, 4])]


def test_quoted_keeps_one_line_and_both_ends() -> None:
    assert quoted('a "b"\n') == '"a \\"b\\"\\n"'
    assert quoted("é" * 10) == '"éééééééééé"'
    assert quoted("\x9b2J\x7f") == '"�2J␡"'
    short = quoted("a" * 100 + "b" * 100, limit=20)
    assert short == '"aaaaaaaa … bbbbbbbb"'


class TestSeveralAnswers:
    def test_rewarded_replies_that_name_another_rows_answer(self) -> None:
        finding = found(EpochFacts(1, SEVERAL, trained=18))[FindingId.SEVERAL_ANSWERS]
        assert finding.sentence == "2 of 6 rewarded replies of epoch 1 also name an answer that another row wants."
        assert "`mode: one_of`" in finding.advice
        assert [each.text for each in finding.examples] == ["Printing the network logs.", "The network, or printing?"]

    @pytest.mark.parametrize(
        "replies",
        [
            [replace(each, reward=0.0) if "or" in each.text else each for each in SEVERAL],
            [replace(each, expected=None) for each in SEVERAL],
            [replace(each, expected=f"{each.expected} {each.row}") for each in SEVERAL],
            [*SEVERAL, *HEALTHY * 5],
            [*HEALTHY, reply(0, "networks for printing", 1.0), reply(1, "networking prints", 1.0)],
            LISTING,
        ],
        ids=["not rewarded", "no answers known", "other answers", "few of many", "parts of words", "one answer to all"],
    )
    def test_what_is_none(self, replies: list[Reply]) -> None:
        assert FindingId.SEVERAL_ANSWERS not in found(EpochFacts(1, replies, trained=18))

    def test_a_held_out_reward_that_is_won_by_naming_several(self) -> None:
        heldout = [
            *(reply(row, f"{TEAMS[row]} or {TEAMS[row - 1]}", 1.0) for row in range(3)),
            reply(3, "payroll", 1.0),
            reply(4, "printing", 0.0),
        ]
        finding = found(EpochFacts(1, HEALTHY, trained=16, heldout=heldout))[FindingId.HELDOUT_SEVERAL]
        assert finding.sentence.startswith("3 of 4 rewarded replies to held-out rows after epoch 1 also name an answer")
        assert "so a held-out reward of 0.800 does not show that the policy chooses" in finding.sentence
        assert [each.row for each in finding.examples] == ["row-0", "row-1", "row-2"]
        for fine in (heldout[2:], HEALTHY, LISTING, ()):
            assert FindingId.HELDOUT_SEVERAL not in found(EpochFacts(1, HEALTHY, trained=16, heldout=fine))

    def test_a_dataset_of_many_answers_is_no_list(self) -> None:
        rows = [replace(each, row=f"row-{n}", expected=f"{n}") for n, each in enumerate(HEALTHY * 2)]
        assert FindingId.SEVERAL_ANSWERS not in found(
            EpochFacts(1, [replace(each, text="1 and 2 and 3", reward=1.0) for each in rows], trained=32)
        )

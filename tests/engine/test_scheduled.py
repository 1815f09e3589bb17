"""What the tiers are told of vLLM's scheduler output."""

from types import SimpleNamespace

from specontext_vllm.engine.kv_group import KVGroup
from specontext_vllm.engine.scheduled import ScheduleReader
from specontext_vllm.step_data import ScheduledStep, StartedRequest

ONE = KVGroup(0, ("layer",), 1)


def new(name, prompt, blocks, computed=0, resumed=None):
    return SimpleNamespace(
        req_id=name,
        prompt_token_ids=[0] * prompt,
        prefill_token_ids=resumed and [0] * resumed,
        num_computed_tokens=computed,
        block_ids=(blocks,),
    )


def output(tokens, started=(), cached=(), resumed=(), finished=(), preempted=None):
    """``cached``: (name, new blocks, computed tokens)."""
    names, blocks, computed = zip(*cached) if cached else ((), (), ())
    return SimpleNamespace(
        finished_req_ids=set(finished),
        preempted_req_ids=preempted,
        scheduled_new_reqs=list(started),
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=names,
            new_block_ids=blocks,
            num_computed_tokens=computed,
            resumed_req_ids=set(resumed),
        ),
        num_scheduled_tokens=tokens,
    )


def test_a_prompt_in_chunks_decodes_once_it_is_computed():
    read = ScheduleReader(ONE).read
    step = read(output({"a": 20}, [new("a", 21, [5, 6])]))
    assert step == ScheduledStep(
        started=[StartedRequest("a", [5, 6], 0)], prefilling=["a"], written=[("a", 0)]
    )
    # The rest of the prompt is one token, and still no decode row.
    step = read(output({"a": 1}, cached=[("a", None, 20)]))
    assert step == ScheduledStep(prefilling=["a"], written=[("a", 1)])
    step = read(output({"a": 1}, cached=[("a", ([7],), 32)]))
    assert step == ScheduledStep(decoding=["a"], grown=[("a", [7])], written=[("a", 2)])


def test_a_prefix_hit_brings_pages_that_are_computed():
    step = ScheduleReader(ONE).read(output({"a": 8}, [new("a", 40, [3, 4, 5], computed=32)]))
    assert step.started == [StartedRequest("a", [3, 4, 5], 2)] and step.written == [("a", 2)]


def test_blocks_of_several_pages_are_read_as_pages():
    """A request holds its block's last pages before it writes to them."""
    read = ScheduleReader(KVGroup(1, ("layer",), 4)).read
    request = new("a", 70, [], computed=64)
    request.block_ids = ([1], [3, 5])
    step = read(output({"a": 6}, [request]))
    assert step.started == [StartedRequest("a", [12, 13, 14, 15, 20, 21, 22, 23], 4)]
    assert step.written == [("a", 4)]
    step = read(output({"a": 1}, cached=[("a", ([2], [7]), 128)]))
    assert step.grown == [("a", [28, 29, 30, 31])] and step.written == [("a", 8)]


def test_a_request_that_resumes_lets_go_of_its_pages_and_starts_again():
    read = ScheduleReader(ONE).read
    read(output({"a": 20}, [new("a", 20, [5, 6])]))
    assert read(output({}, preempted={"a"})).released == ["a"]
    step = read(output({"a": 22}, cached=[("a", ([8, 9],), 0)], resumed=["a"]))
    assert step.released == ["a"] and step.started == [StartedRequest("a", [8, 9], 0)]
    assert step.prefilling == ["a"] and not step.written and not step.grown


def test_tokens_that_the_v2_runner_computes_again_are_a_prompt():
    read = ScheduleReader(ONE).read
    step = read(output({"a": 1}, [new("a", 20, [5, 6], computed=24, resumed=25)]))
    assert step.prefilling == ["a"]


def test_a_finished_request_is_forgotten():
    read = ScheduleReader(ONE).read
    read(output({"a": 20}, [new("a", 20, [5, 6])]))
    assert read(output({}, finished=["a"])).released == ["a"]
    # A short request of the same name is another one.
    read(output({"a": 2}, [new("a", 2, [5])]))
    assert read(output({"a": 1}, cached=[("a", None, 2)])).decoding == ["a"]

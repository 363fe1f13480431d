"""What the scaler sees of what routers say."""

from __future__ import annotations

from protos import tandem_pb2 as pb
from tandem.scaling.look import look_of


def worker(name: str, token_s: float = 0.0, sequence_s: float = 0.0, **values: int) -> pb.ProcessStatus:
    prices = pb.StepPrices(base_s=0.005 if token_s or sequence_s else 0.0, token_s=token_s, sequence_s=sequence_s)
    return pb.ProcessStatus(
        name=name, role=name.split("-")[0], num_blocks=100, max_running=32, max_step_tokens=512, prices=prices, **values
    )


def test_workers_are_counted_once_and_requests_at_each_router() -> None:
    workers = [worker("prefill-0", token_s=1e-3, waiting_tokens=50), worker("decode-0", 0.0, 2e-3, waiting_tokens=9)]
    clusters = [
        pb.GetClusterResponse(
            router_epoch=epoch,
            processes=workers,
            block_size=16,
            num_waiting_requests=2,
            traffic=pb.Traffic(num_requests=num, answer_tokens=answer),
        )
        for epoch, num, answer in (("a", 10, 100.0), ("b", 5, 300.0), ("c", 0, 0.0))
    ]
    look = look_of(clusters)
    assert {epoch: totals.num_requests for epoch, totals in look.totals.items()} == {"a": 10, "b": 5, "c": 0}
    assert (look.answer_tokens, look.waiting_requests, look.waiting_tokens) == (200.0, 6, 50)
    assert look.prefill is not None
    assert (look.prefill.prices.token_s, look.prefill.kv_tokens, look.prefill.step_tokens) == (1e-3, 1600, 512)


def test_the_typical_worker_is_the_median_of_those_that_know_what_their_work_costs() -> None:
    slow_start = [worker(f"prefill-{number}", token_s) for number, token_s in enumerate((1e-3, 1.1e-3, 0.0, 9e-3))]
    look = look_of([pb.GetClusterResponse(processes=slow_start, block_size=16)])
    assert look.prefill is not None
    assert look.prefill.prices.token_s == 1.1e-3
    assert look.decode is None


def test_where_no_prefill_worker_knows_its_prices_those_of_decode_workers_are_taken() -> None:
    look = look_of(
        [pb.GetClusterResponse(processes=[worker("prefill-0"), worker("decode-0", 2e-3, 1e-3)], block_size=16)]
    )
    assert look.prefill is not None
    assert look.prefill.prices.token_s == 2e-3

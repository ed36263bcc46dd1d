"""The encoder: the bytes of the definition, ties included."""

import pytest
import torch

from hf_lrq.kernels.triton import viterbi


def definition(points, half_norms, x, window):
    """Dynamic programming in int64, state by state of the definition."""

    def run(order, start):
        """Back pointers [steps, n, 256] and last costs [n, 256] of paths along the steps in `order`."""
        cost = torch.zeros(len(x), 256, dtype=torch.long)
        back = []
        for i, t in enumerate(order):
            e = half_norms.long() - torch.einsum("pcv,nv->npc", points.long(), x[:, t].long())
            total = cost[:, :, None] + e
            if i == 0 and start is not None:
                total[torch.arange(256)[None, :] != start[:, None]] = 1 << 40
            cost, chosen = total.min(1)
            # min gives any of equal candidates: take the first.
            chosen = (total == cost[:, None]).long().argmax(1)
            back.append(chosen)
        return back, cost

    def trace(back, state):
        path = []
        for chosen in reversed(back):
            path.append(state)
            state = chosen.gather(1, state[:, None])[:, 0]
        return torch.stack(path[::-1], 1), state

    steps = x.shape[1]
    back, cost = run([t % steps for t in range(steps - window, steps + window)], None)
    last = (cost == cost.min(1, keepdim=True).values).long().argmax(1)
    path, _ = trace(back, last)
    seam = path[:, window - 1]
    back, _ = run(range(steps), seam)
    path, start = trace(back, seam)
    assert torch.equal(start, seam)
    return path.to(torch.uint8)


@pytest.mark.parametrize(("width", "steps", "count"), [(4, 6, 5), (2, 4, 1), (4, 4, 0)])
def test_paths_are_those_of_the_definition(width, steps, count, device):
    generator = torch.Generator().manual_seed(width)
    largest, unit = {4: (255, 1), 2: (1020, 2)}[width]
    points = torch.randint(-largest, largest + 1, (256, 256, width), generator=generator).to(torch.int16)
    half_norms = (points.long().square().sum(-1) // (2 * unit)).to(torch.int32)
    x = torch.randint(-511, 512, (count, steps, width), generator=generator).to(torch.int16)
    found = viterbi(points.to(device), half_norms.to(device), x.to(device), steps // 2)
    assert found.dtype == torch.uint8
    assert torch.equal(found.cpu(), definition(points, half_norms, x, steps // 2))


def test_ties_go_to_the_smallest_predecessor_and_state(device):
    points = torch.zeros(256, 256, 4, dtype=torch.int16, device=device)
    half_norms = torch.zeros(256, 256, dtype=torch.int32, device=device)
    x = torch.ones(1, 2, 4, dtype=torch.int16, device=device)
    assert viterbi(points, half_norms, x, 1).tolist() == [[0, 0]]

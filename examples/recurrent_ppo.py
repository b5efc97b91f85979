"""Recurrent PPO on a game of memory: the rollout on a stream, the update on whole sequences with resets.

A cue is shown in an episode's first step only; in its last, some steps later, the action must repeat it. Half of all
answers are right by chance. Run with: python examples/recurrent_ppo.py
"""

import argparse

import torch
from torch import Tensor, nn

import fusedrnn

CUES = 2


class Recall:
    """``count`` games side by side, each of 2 to 6 steps and begun anew when it ends."""

    def __init__(self, count: int) -> None:
        self.left = torch.zeros(count, dtype=torch.int64)
        self.cue = torch.zeros(count, dtype=torch.int64)
        self.begin(torch.ones(count, dtype=torch.bool))

    def begin(self, over: Tensor) -> None:
        """New games where the old ones are over; what is observed: the cue if it is shown, and whether to answer."""
        count = len(over)
        self.left = torch.where(over, torch.randint(1, 6, (count,)), self.left - 1)
        self.cue = torch.where(over, torch.randint(CUES, (count,)), self.cue)
        shown = nn.functional.one_hot(self.cue, CUES) * over.unsqueeze(1)
        self.seen = torch.cat([shown, (self.left == 0).unsqueeze(1)], 1).float()

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards and which games are over."""
        over = self.left == 0
        reward = (over & (action == self.cue)).float()
        self.begin(over)
        return reward, over


class Policy(nn.Module):
    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.memory = fusedrnn.LSTM(CUES + 1, hidden)
        self.actor, self.critic = nn.Linear(hidden, CUES), nn.Linear(hidden, 1)

    def heads(self, y: Tensor) -> tuple[torch.distributions.Categorical, Tensor]:
        return torch.distributions.Categorical(logits=self.actor(y)), self.critic(y).squeeze(-1)


@torch.no_grad()
def rollout(policy: Policy, stream: fusedrnn.Stream, game: Recall, begun: Tensor, steps: int):
    """What an update needs, time first; ``begun`` says which rows are at an episode's first step, and is kept up."""
    columns = []
    for _ in range(steps):
        seen, starts = game.seen, begun.clone()
        choice, value = policy.heads(stream(seen, starts))
        action = choice.sample()
        reward, over = game.step(action)
        begun.copy_(over)
        columns.append((seen, starts, action, choice.log_prob(action), value, reward, over))
    return [torch.stack(column) for column in zip(*columns, strict=True)]


def advantages(value: Tensor, reward: Tensor, over: Tensor, discount: float = 0.99, decay: float = 0.95) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016); a sequence cut short counts on its last value."""
    after, total, found = value[-1], torch.zeros_like(value[-1]), torch.empty_like(value)
    for t in reversed(range(len(value))):
        goes_on = (~over[t]).float()
        total = reward[t] + discount * goes_on * after - value[t] + discount * decay * goes_on * total
        found[t], after = total, value[t]
    return found


def main(updates: int = 60, games: int = 64, steps: int = 32, seed: int = 0) -> float:
    """Trains, and returns the share of right answers in the last rollout."""
    torch.manual_seed(seed)
    policy, game = Policy(), Recall(games)
    optimiser = torch.optim.Adam(policy.parameters(), lr=3e-3)
    stream, begun = policy.memory.stream(games), torch.ones(games, dtype=torch.bool)
    right = 0.0
    for update in range(1, updates + 1):
        hx = stream.state
        seen, starts, action, old, value, reward, over = rollout(policy, stream, game, begun, steps)
        advantage = advantages(value, reward, over)
        target = value + advantage
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        for _ in range(4):
            y, _ = policy.memory(seen, hx, resets=starts)  # all games and steps at once, as the rollout saw them
            choice, now = policy.heads(y)
            ratio = (choice.log_prob(action) - old).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
            loss = 0.5 * (now - target).square().mean() - gain - 0.01 * choice.entropy().mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimiser.step()
        stream.refresh()  # the next rollout acts with the new weights
        right = float(reward.sum() / over.sum())
        if update % 10 == 0:
            print(f"update {update:3}: {right:.0%} of the answers are right")
    return right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))

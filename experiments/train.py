"""One training run: `python -m experiments.train system=deepspeed model.num_experts=16 seed=3 trainer.max_steps=200`.

`-m system=flat,deepspeed seed=0,1` sweeps. Started plainly it spawns its local ranks; under torchrun or srun it joins
the ranks that are there.
"""

from __future__ import annotations

from experiments.cells import announce_and_check, run_cells, run_dir_of
from experiments.cli import hydra_main
from experiments.config import RunConfig
from experiments.launch import is_main_process
from experiments.measured_cluster import with_costs


@hydra_main("train")
def main(config: RunConfig, overrides: list[str]) -> None:
    """Say what will be trained, train it, say where the results are."""
    config = with_costs(config, overrides)
    announce_and_check([config])
    failures = run_cells([config], overrides)
    if failures:
        raise failures[0].error
    if is_main_process():
        print(f"results: {run_dir_of(config).path}", flush=True)


if __name__ == "__main__":
    main()

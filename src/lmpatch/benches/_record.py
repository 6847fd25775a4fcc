"""How a number of a bench was made: what identifies a run, and what is added when it is done."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..data.edits import Edit
from ..models.lm import LM
from ..patches.patch import Mount, Patch
from ..provenance import hardware, hash_json, now, versions
from ._health import peak_memory
from ._rows import Metric, protocol, retention

if TYPE_CHECKING:
    from ._report import Run
    from .facts import Config

WARM_UP = 3  # commits whose time is left out of edit_s, where there are more
COSTS = ("bootstrap", "batch_size", "fit_batch", "latency", "health")
"""Settings that decide no answer: a run may go on under others."""
OWN = ("immediate", "retention")
"""Settings that add rows to a method's run and leave the baselines as they are."""


@dataclass(frozen=True)
class Identity:
    """What all runs of one bench call share."""

    shared: dict[str, Any]
    group: dict[str, Any]
    own: dict[str, Any]

    def of(self, run_id: str, *, baseline: bool) -> dict[str, Any]:
        """The record of one run before it starts."""
        settings = self.group if baseline else self.group | self.own
        record = {"run_id": run_id, "comparable_group": hash_json(self.group)[:16], "settings": settings}
        record |= {"baseline": baseline} | self.shared
        return record | ({"prep": None, "mount": None} if baseline else {})


def suffix(cfg: Config) -> str:
    """What in the settings makes another protocol, as the end of its id."""
    length = "" if cfg.max_new_tokens == 32 else f"-{cfg.max_new_tokens}tokens"
    return f"-{cfg.em_rule}{length}" + ("-chat" if cfg.chat else "") + ("-raw" if cfg.raw else "")


def about(lm: LM) -> dict[str, Any]:
    """The model without its patches, and what else every bench records."""
    return {
        "base_model": lm.name,
        "base_weights_hash": lm.fingerprint(),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "tokenizer_hash": hash_json(lm.tokenizer.backend_tokenizer.to_str())[:16],
        "started": now(),
        "versions": versions(),
        "hardware": hardware(),
    }


def shared(lm: LM, bench: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What all runs of one call record; only runs of equal settings, on one model, stand in one table."""
    known = about(lm)
    settings = settings | {key: known[key] for key in ("base_weights_hash", "dtype")}
    return known | {"bench": bench, "comparable_group": hash_json(settings)[:16], "settings": settings}


def of_patch(shared: dict[str, Any], run_id: str, patch: Patch, mount: Mount | None) -> dict[str, Any]:
    """The record of a patched model's run before it starts."""
    own = {"mount": mount or patch.mounts[0], "patch": patch.hash()}
    made = {"run_id": run_id or patch.method, "baseline": False, "settings": shared["settings"] | own}
    return shared | made | {"method": patch.method, "mount": own["mount"], "patch_hash": own["patch"]}


def identity(
    lm: LM,
    edits: Sequence[Edit],
    cfg: Config,
    *,
    mount: str | None,
    settings: Mapping[str, Any] | None,
    prep: Mapping[str, Any] | None,
    data_name: str,
    planned: int,
    left: int,
) -> Identity:
    """Everything that is known before the run."""
    config = asdict(cfg)
    data, weights = hash_json([asdict(edit) for edit in edits]), lm.fingerprint()
    group = {k: v for k, v in config.items() if k not in (*COSTS, *OWN)}
    group |= {"data_hash": data, "base_weights_hash": weights, "protocol_id": protocol("gen", "final", suffix(cfg))}
    own = {k: config[k] for k in OWN} | {"mount": mount, "method": dict(settings or {})}
    shared = {
        "bench": "facts",
        "protocol_id": group["protocol_id"],
        "n_edits": cfg.n,
        "commit_size": cfg.commit_size or cfg.n,
        "order_seed": cfg.seed,
        "planned": planned,
        "left_over": left,
        "mount": mount,
        "chat_template": bool(cfg.chat),
        "data_name": data_name,
        "data_hash": data,
        "prep": dict(prep) if prep else None,
        "bootstrap": cfg.bootstrap,
        "suffix": suffix(cfg),
        **about(lm),
    }
    return Identity(shared, group, own)


def results(lm: LM, run: Run) -> dict[str, Any]:
    """Costs, health and numbers of a finished run, from its rows and chunks."""
    commits = [commit for chunk in run.chunks for commit in chunk.get("commits", [])]
    each = [commit["seconds"] / commit["edits"] for commit in commits if commit["edits"]]
    counts: Counter[str] = Counter()
    for chunk in run.chunks:
        counts.update(chunk["counts"])
    made: dict[str, Any] = {
        "collision_counts": dict(counts),
        "chunks": len(run.chunks),
        "metrics": [asdict(metric) for metric in run.metrics()],
    }
    if commits:
        edits = sum(commit["edits"] for commit in commits)
        made["method"] = commits[0]["method"]
        made["mount"] = commits[0].get("mount", run.record["mount"])  # written before results held it
        made["patch_hash"] = commits[0]["patch"] if len(commits) == 1 else hash_json([c["patch"] for c in commits])
        made["edit_s"] = _times(each[WARM_UP:] if len(each) > WARM_UP else each)
        made["bytes_per_edit"] = sum(commit["bytes"] for commit in commits) / edits
        made["infer_ms"] = next((chunk["infer_ms"] for chunk in run.chunks if chunk.get("infer_ms")), None)
        made["peak_mem"] = peak_memory(lm)
        made["refused"] = sum(chunk["refused"] for chunk in run.chunks)
        made["retention"] = retention(run.rows)
        made["health"] = _health(run.chunks, commits)
        made["collapsed_at"] = [chunk["collapsed_at"] for chunk in run.chunks if chunk["collapsed_at"] is not None]
    return made


def _times(each: list[float]) -> dict[str, float]:
    p95 = statistics.quantiles(each, n=20, method="inclusive")[-1] if len(each) > 1 else each[0]
    return {"median": statistics.median(each), "p95": p95, "commits": len(each)}


def _health(chunks: Sequence[Mapping[str, Any]], commits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The worst that was seen after any commit."""
    seen = [c["perplexity"] for c in commits if "perplexity" in c]
    changes = [value for c in commits for value in c["change"].values()]
    return {
        "base_perplexity": chunks[0]["base_perplexity"],
        "perplexity_max": max(seen, default=None),
        "change_max": max(changes, default=None),
        "rounding_error_max": max(c["rounding_error"] for c in commits),
    }


def find(metrics: Sequence[Metric], name: str, split: str = "all", when: str = "final") -> Metric | None:
    """The metric of that name; ``when`` is ``final`` or ``immediate``."""
    mark = {"final": ("-final-", "-recipe-chunk-", "-retention-"), "immediate": ("-immediate-",)}[when]
    found = (m for m in metrics if m.name == name and m.split == split and any(part in m.protocol for part in mark))
    return next(found, None)

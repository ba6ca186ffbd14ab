"""The stages that learn, from rows to an ensemble: what each reads, what it leaves in the run folder.

A stage takes plain values of the stages before it and returns one. Where its marker in the run folder carries the
fingerprint of its inputs, the value is read back instead of computed. The order is pipeline.py's business; the
stages that judge the outcome are in judging.py. Test rows enter no fingerprint and no computation here.

:mod:`.request` refuses what can't be carried out; :mod:`.rows` holds what is learnt from; :mod:`.warmup` may move the
start; :mod:`.choosing` has the stages up to the plan, :mod:`.learning` those that train, :mod:`.combining` the weights.
"""

from __future__ import annotations

from ensemblelora.stages.bench import Bench, equip
from ensemblelora.stages.choosing import (
    choose_plan,
    estimate_affinity,
    identify_features,
    plan_budget,
    read_oracle,
    take_features,
)
from ensemblelora.stages.combining import combine_members, settle_weights
from ensemblelora.stages.fine_tuning import finish_whole
from ensemblelora.stages.kept import score_members
from ensemblelora.stages.learning import (
    BOOSTING_FILE,
    boost_groups,
    find_boosters,
    keep_adapter,
    list_boost_tasks,
    settle_boosting,
    train_adapter,
    train_groups,
)
from ensemblelora.stages.request import check_fit, check_request, choose_head, count_labels, prepare
from ensemblelora.stages.rows import (
    Rows,
    describe_run,
    drop_lower_layers,
    encode_tasks,
    keep_lower_layers,
    make_records,
)
from ensemblelora.stages.warmup import identify_start, train_warmup, warm_up

__all__ = [
    "BOOSTING_FILE",
    "Bench",
    "Rows",
    "boost_groups",
    "check_fit",
    "check_request",
    "choose_head",
    "choose_plan",
    "combine_members",
    "count_labels",
    "describe_run",
    "drop_lower_layers",
    "encode_tasks",
    "equip",
    "estimate_affinity",
    "find_boosters",
    "finish_whole",
    "identify_features",
    "identify_start",
    "keep_adapter",
    "keep_lower_layers",
    "list_boost_tasks",
    "make_records",
    "plan_budget",
    "prepare",
    "read_oracle",
    "score_members",
    "settle_boosting",
    "settle_weights",
    "take_features",
    "train_adapter",
    "train_groups",
    "train_warmup",
    "warm_up",
]

"""What Slurm's reasons for a waiting job mean to the person who waits."""

_FOR_EVER = "it waits for ever: cancel it and submit it"
_MEANINGS = {
    "Resources": "the job is next, and waits for nodes to become free",
    "Priority": "jobs of higher priority wait before it",
    "Dependency": "it waits for the job that its --dependency names",
    "DependencyNeverSatisfied": f"the job that its --dependency names ended otherwise; {_FOR_EVER} without it",
    "PartitionConfig": f"the partition has no such nodes, or not as many; {_FOR_EVER} with fewer nodes, GPUs or CPUs",
    "PartitionNodeLimit": f"it asks for more nodes than a job may have in the partition; {_FOR_EVER} with fewer",
    "PartitionTimeLimit": f"its --time is above the partition's limit; {_FOR_EVER} with less",
    "PartitionDown": "the partition takes jobs but starts none",
    "PartitionInactive": "the partition takes jobs but starts none",
    "BadConstraints": f"no node has the features or resources that it asks for; {_FOR_EVER} with others",
    "BeginTime": "its time to begin has not come; a requeued job waits a moment",
    "JobHeldUser": "somebody holds it: scontrol release JOB lets it go",
    "JobHeldAdmin": "an administrator holds it, or it failed to start too often",
    "ReqNodeNotAvail": "nodes that it asks for are down, drained or reserved",
    "NodeDown": "a node that it asks for is down",
    "Reservation": "it waits for its reservation to begin",
    "Licenses": "it waits for a licence",
    "JobArrayTaskLimit": "as many tasks of the array run as may at once",
    "InvalidAccount": f"its account is not valid; {_FOR_EVER} with another --account",
    "InvalidQOS": f"its quality of service is not valid; {_FOR_EVER} with another --qos",
    "QOSMaxWallDurationPerJobLimit": f"its --time is above the limit of its --qos; {_FOR_EVER} with less",
    "QOSMinGRES": f"its --qos wants more GPUs a job; {_FOR_EVER} with more",
    "launch failed requeued held": "its node could not start it; scontrol release JOB tries again",
}
_BEGINNINGS = {
    "ReqNodeNotAvail": _MEANINGS["ReqNodeNotAvail"],
    "AssocGrp": "your account's share is in use; it starts when jobs of the account end",
    "AssocMax": "you have as much as your account allows one person or job",
    "QOSGrp": "what its --qos may use in all is in use; it starts when other jobs end",
    "QOSMax": "it asks for more than its --qos allows one person or job, or other jobs of yours use that up",
}


def meaning_of(reason: str) -> str:
    """A reason of squeue's in other words; empty where it is not known."""
    if reason in _MEANINGS:
        return _MEANINGS[reason]
    return next((text for beginning, text in _BEGINNINGS.items() if reason.startswith(beginning)), "")

//! Every key of a recipe outside the task's own tables: the one list that is read, printed and searched for
//! near misses.

/// Tables whose content belongs to the task.
pub(super) const TASK_TABLES: [&str; 2] = ["model", "data"];

/// One key of a recipe.
pub(super) struct Key {
    /// Its dotted path.
    pub(super) path: &'static str,
    /// The default as TOML; keys without one must be written.
    pub(super) default: Option<&'static str>,
    /// What it is for, in a few words.
    pub(super) what: &'static str,
    /// What other trainers call it, for better guesses.
    also: &'static [&'static str],
}

const fn required(path: &'static str, what: &'static str, also: &'static [&'static str]) -> Key {
    Key { path, default: None, what, also }
}

const fn optional(
    path: &'static str,
    default: &'static str,
    what: &'static str,
    also: &'static [&'static str],
) -> Key {
    Key { path, default: Some(default), what, also }
}

/// In the order in which they are printed.
pub(super) const KEYS: &[Key] = &[
    required("name", "names the run and its folder", &["run_name"]),
    optional("seed", "0", "root of all randomness", &["random_seed"]),
    required("model.family", "selects the task, such as \"gpt\"", &["type", "architecture"]),
    optional(
        "model.recompute",
        "false",
        "whether activations are computed again to save memory; always where shard is \"full\"",
        &["gradient_checkpointing", "activation_checkpointing", "checkpointing"],
    ),
    required("batch.size", "sequences per step", &["batch_size", "global_batch_size"]),
    required("batch.micro", "sequences per micro-batch", &["micro_batch_size"]),
    optional("optimizer.name", "\"adamw\"", "the only one so far", &["type"]),
    required("optimizer.lr", "peak learning rate", &["learning_rate"]),
    optional("optimizer.betas", "[0.9, 0.95]", "decay of the two moments", &["beta1", "beta2"]),
    optional("optimizer.eps", "1e-8", "added to the root of the second moment", &["epsilon"]),
    optional("optimizer.weight_decay", "0.1", "decoupled decay of matrices", &["decay"]),
    optional("optimizer.clip", "\"none\"", "largest global gradient norm", &["grad_clip", "max_grad_norm"]),
    optional("optimizer.schedule.kind", "\"constant\"", "\"constant\" or \"cosine\"", &["lr_scheduler"]),
    optional("optimizer.schedule.warmup", "0", "steps of warm-up", &["warmup_steps"]),
    optional("optimizer.schedule.final", "0.0", "factor at the last step", &["min_lr", "min_lr_ratio"]),
    required("train.steps", "steps of the whole run", &["max_steps", "num_steps", "iterations"]),
    optional("reduce.sum", "\"exact\"", "arithmetic of the gradient sum", &[]),
    optional(
        "reduce.bits",
        "32",
        "bits of an exact sum that cross the ring: 8, 12, 16, 24, 32 or \"auto\"",
        &["compression"],
    ),
    optional("reduce.nonfinite", "\"stop\"", "what to do about infinities and NaN", &[]),
    optional("checkpoint.to", "\"{out}/checkpoints\"", "folder or URL of checkpoints", &["path", "dir"]),
    optional("checkpoint.every", "100", "steps between checkpoints", &["interval", "save_every"]),
    optional("checkpoint.keep", "3", "complete checkpoints to keep", &["max_to_keep"]),
    optional(
        "checkpoint.keep_every",
        "1000",
        "keep those of every so many steps too; 0 for none",
        &["milestones"],
    ),
    optional("checkpoint.memory", "\"64MiB\"", "what a worker's uploads hold at a time", &["buffer"]),
    optional(
        "parallel.shard",
        "\"none\"",
        "what is divided among workers: \"none\", \"optimizer\" or \"full\"",
        &["zero_stage", "fsdp"],
    ),
    optional("parallel.buddies", "true", "whether each shard has a second holder", &["replicas"]),
    optional("elastic.min_workers", "1", "the run waits for this many", &["min_nodes"]),
    optional("elastic.max_workers", "64", "no more than this are admitted", &["max_nodes", "workers"]),
    optional("elastic.timeout", "\"10s\"", "how long a silent peer is waited for", &[]),
    optional("elastic.audit", "0.0", "the share of micro-batches that a second worker computes too", &[]),
];

/// The key at a path.
pub(super) fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.path == path)
}

/// Whether keys lie below this path.
pub(super) fn is_section(path: &str) -> bool {
    KEYS.iter().any(|key| key.path.strip_prefix(path).is_some_and(|rest| rest.starts_with('.')))
        || TASK_TABLES.contains(&path)
}

/// The place of a key or section in the printed order.
pub(super) fn position(path: &str) -> usize {
    let below =
        |key: &Key| key.path == path || key.path.strip_prefix(path).is_some_and(|rest| rest.starts_with('.'));
    KEYS.iter().position(below).unwrap_or(KEYS.len())
}

/// The valid key most like `path`: by its last name first, then by where it stands.
pub(super) fn nearest(path: &str) -> &'static str {
    let (section, name) = split(path);
    let likeness = |key: &&Key| {
        let (key_section, key_name) = split(key.path);
        let names = std::iter::once(&key_name).chain(key.also);
        let name_distance = names
            .map(|candidate| strsim::damerau_levenshtein(name, candidate))
            .min()
            .unwrap_or(usize::MAX / 4);
        let section_distance = strsim::damerau_levenshtein(section, key_section).min(3);
        (2 * name_distance + section_distance, key.path.len())
    };
    KEYS.iter().min_by_key(likeness).map_or("name", |key| key.path)
}

/// The one of `candidates` most like `name`.
pub(super) fn nearest_of<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates.into_iter().min_by_key(|candidate| strsim::damerau_levenshtein(name, candidate))
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('.').unwrap_or(("", path))
}

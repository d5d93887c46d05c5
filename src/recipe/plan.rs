//! From the tree of what was written to the checked [`Plan`]: every type, range and contradiction is
//! settled here.

use std::path::Path;
use std::time::Duration;

use mattock_worker::plan::{
    AdamW, Batch, Bits, Checkpoint, Elastic, NonFinite, Parallel, Plan, Reduce, Schedule, Shard, Sum,
};
use toml::Value;

use super::keys::{self, TASK_TABLES};
use super::task_table::to_json;
use super::tree::{Node, Table};
use super::{Origin, RecipeError};

const NAME_CHARS_MAX: usize = 64;
const BATCH_MAX: i64 = 1 << 20;
const WORKERS_MAX: i64 = 4096;
const TIMEOUT_MIN: Duration = Duration::from_millis(100);
const TIMEOUT_MAX: Duration = Duration::from_secs(3600);
const MEMORY_MIN: u64 = 16 << 20;
const MEMORY_MAX: u64 = 64 << 30;

/// Checks everything, and writes the defaults that it used into the tree.
pub(super) fn check(tree: &mut Table, file: &Path) -> Result<Plan, RecipeError> {
    refuse_unknown(tree)?;
    let mut reader = Reader { tree, file };
    let name = reader.name()?;
    reader.text("model.family")?;
    let steps = reader.whole("train.steps", 1, i64::MAX)?.unsigned_abs();
    let batch = reader.batch()?;
    let reduce = reader.reduce(batch.micro_batches())?;
    let parallel = reader.parallel(reduce.sum)?;
    let recompute = reader.recompute(parallel.shard)?;
    let mut model = to_json(reader.tree, "model")?;
    // All but this is the task's.
    model.remove("recompute");
    Ok(Plan {
        name,
        seed: reader.whole("seed", 0, i64::MAX)?.unsigned_abs(),
        batch,
        optimizer: reader.optimizer(steps)?,
        steps,
        reduce,
        checkpoint: reader.checkpoint()?,
        parallel,
        elastic: reader.elastic()?,
        model,
        recompute,
        data: to_json(reader.tree, "data")?,
    })
}

fn refuse_unknown(tree: &Table) -> Result<(), RecipeError> {
    for (path, node) in tree.leaves() {
        let section = path.split('.').next().unwrap_or_default();
        let known = TASK_TABLES.contains(&section) || keys::find(&path).is_some() || keys::is_section(&path);
        if !known {
            let nearest = keys::nearest(&path).to_owned();
            return Err(RecipeError::UnknownKey { origin: node.origin().clone(), key: path, nearest });
        }
    }
    Ok(())
}

/// Reads keys out of a tree; what nobody wrote is put there with its default.
struct Reader<'a> {
    tree: &'a mut Table,
    file: &'a Path,
}

impl Reader<'_> {
    fn name(&mut self) -> Result<String, RecipeError> {
        let name = self.text("name")?;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > NAME_CHARS_MAX || name.starts_with('.') || !name.chars().all(plain)
        {
            return Err(self.refuse(
                "name",
                format!(
                    "is {name:?}, but it names a folder: use letters, \
                digits, `-`, `_` and `.`, at most {NAME_CHARS_MAX} of them"
                ),
            ));
        }
        Ok(name)
    }

    fn batch(&mut self) -> Result<Batch, RecipeError> {
        let size = self.count("batch.size", 1, BATCH_MAX)?;
        let micro = self.count("batch.micro", 1, BATCH_MAX)?;
        if size % micro != 0 {
            let below = size - size % micro;
            let sizes = if below == 0 { format!("{micro}") } else { format!("{below} or {}", below + micro) };
            let micros = nearest_divisors(size, micro);
            return Err(self.refuse(
                "batch.size",
                format!(
                    "is {size}, which micro-batches of {micro} do not divide: {sizes} would do, or \
                    `batch.micro` = {micros}"
                ),
            ));
        }
        Ok(Batch { size, micro })
    }

    fn optimizer(&mut self, steps: u64) -> Result<AdamW, RecipeError> {
        self.choice("optimizer.name", &[("adamw", ())])?;
        Ok(AdamW {
            lr: self.real("optimizer.lr", "a number above 0", |lr| lr > 0.0)?,
            betas: self.betas()?,
            eps: self.real("optimizer.eps", "a number above 0", |eps| eps > 0.0)?,
            weight_decay: self.real("optimizer.weight_decay", "0 or more", |decay| decay >= 0.0)?,
            clip: self.clip()?,
            schedule: self.schedule(steps)?,
        })
    }

    fn betas(&mut self) -> Result<[f64; 2], RecipeError> {
        let key = "optimizer.betas";
        let value = self.value(key)?;
        let betas: Option<Vec<f64>> = value.as_array().and_then(|betas| betas.iter().map(number).collect());
        match betas.as_deref() {
            Some(&[first, second]) if [first, second].iter().all(|beta| (0.0..1.0).contains(beta)) => {
                Ok([first, second])
            }
            _ => {
                Err(self
                    .refuse(key, format!("is {value}, expected two numbers, each at least 0 and below 1")))
            }
        }
    }

    fn clip(&mut self) -> Result<Option<f64>, RecipeError> {
        if self.value("optimizer.clip")?.as_str() == Some("none") {
            return Ok(None);
        }
        self.real("optimizer.clip", "a number above 0, or \"none\"", |clip| clip > 0.0).map(Some)
    }

    fn schedule(&mut self, steps: u64) -> Result<Schedule, RecipeError> {
        let last = "optimizer.schedule.final";
        let cosine = self.choice("optimizer.schedule.kind", &[("constant", false), ("cosine", true)])?;
        let warmup = self.whole("optimizer.schedule.warmup", 0, i64::MAX)?.unsigned_abs();
        if warmup > steps {
            return Err(self.refuse(
                "optimizer.schedule.warmup",
                format!("is {warmup}, more than the {steps} steps of the run (`train.steps`)"),
            ));
        }
        if cosine {
            let last = self.real(last, "a factor between 0 and 1", |factor| (0.0..=1.0).contains(&factor))?;
            return Ok(Schedule::Cosine { warmup, last });
        }
        if self.tree.get(last).is_some() {
            return Err(self.refuse(
                last,
                "says where a cosine ends, but `optimizer.schedule.kind` is \
                \"constant\": remove one of the two",
            ));
        }
        Ok(Schedule::Constant { warmup })
    }

    fn reduce(&mut self, micro_batches: u32) -> Result<Reduce, RecipeError> {
        let sums = [("exact", Sum::Exact), ("exact64", Sum::Exact64), ("f32", Sum::F32), ("bf16", Sum::Bf16)];
        let sum = self.choice("reduce.sum", &sums)?;
        let (bits, auto) = self.bits(sum, micro_batches)?;
        Ok(Reduce {
            sum,
            bits,
            auto,
            nonfinite: self
                .choice("reduce.nonfinite", &[("stop", NonFinite::Stop), ("skip", NonFinite::Skip)])?,
        })
    }

    /// The bits, or 32 and that they are to be chosen.
    fn bits(&mut self, sum: Sum, micro_batches: u32) -> Result<(Bits, bool), RecipeError> {
        let key = "reduce.bits";
        let value = self.value(key)?;
        let bits = match &value {
            Value::String(text) if text == "auto" => Some(Bits::B32),
            Value::Integer(count) => Bits::ALL.into_iter().find(|bits| i64::from(bits.count()) == *count),
            _ => None,
        };
        let auto = value.is_str();
        let Some(bits) = bits else {
            return Err(self.refuse(key, format!("is {value}, expected 8, 12, 16, 24, 32 or \"auto\"")));
        };
        if (auto || bits != Bits::B32) && !matches!(sum, Sum::Exact | Sum::Exact64) {
            let problem = format!(
                "is {value}, but `reduce.sum` adds floats, whose bits it fixes: remove one, or write sum = \"exact\""
            );
            return Err(self.refuse(key, problem));
        }
        let most = bits.micro_batches_max();
        if micro_batches > most {
            let problem = format!(
                "is {value}, too few for the sum of {micro_batches} micro-batches (`batch.size` / `batch.micro`): take \
                larger micro-batches, {most} of them at most, or more bits"
            );
            return Err(self.refuse(key, problem));
        }
        Ok((bits, auto))
    }

    fn checkpoint(&mut self) -> Result<Checkpoint, RecipeError> {
        let to = self.text("checkpoint.to")?;
        if to.is_empty() {
            return Err(self.refuse(
                "checkpoint.to",
                "is empty, expected a folder or a URL, such as \
                \"{out}/checkpoints\" or \"s3://bucket/prefix\"",
            ));
        }
        Ok(Checkpoint {
            to,
            every: self.whole("checkpoint.every", 0, i64::MAX)?.unsigned_abs(),
            keep: self.count("checkpoint.keep", 1, i64::from(u32::MAX))?,
            keep_every: self.whole("checkpoint.keep_every", 0, i64::MAX)?.unsigned_abs(),
            memory: self.memory()?,
        })
    }

    fn parallel(&mut self, sum: Sum) -> Result<Parallel, RecipeError> {
        let shards = [("none", Shard::None), ("optimizer", Shard::Optimizer), ("full", Shard::Full)];
        let shard = self.choice("parallel.shard", &shards)?;
        if shard == Shard::Full && !matches!(sum, Sum::Exact | Sum::Exact64) {
            let problem = "is \"full\", which adds up integers only: write reduce.sum = \"exact\", or shard = \"optimizer\"";
            return Err(self.refuse("parallel.shard", problem));
        }
        Ok(Parallel { shard, buddies: self.flag("parallel.buddies")? })
    }

    /// What is divided as a whole is always computed again.
    fn recompute(&mut self, shard: Shard) -> Result<bool, RecipeError> {
        let key = "model.recompute";
        if shard == Shard::Full && self.tree.get(key).is_none() {
            self.refuse_value_for_section(key)?;
            self.tree.insert(key, Node::Value(Value::Boolean(true), Origin::Default));
        }
        match self.flag(key)? {
            false if shard == Shard::Full => {
                let problem = "is false, but with parallel.shard = \"full\" a block's parameters are given up after use, and the \
                    block is computed again on the way back: remove it, or write shard = \"optimizer\"";
                Err(self.refuse(key, problem))
            }
            recompute => Ok(recompute),
        }
    }

    fn memory(&mut self) -> Result<u64, RecipeError> {
        let key = "checkpoint.memory";
        let text = self.text(key)?;
        match mebibytes(&text) {
            Some(bytes) if (MEMORY_MIN..=MEMORY_MAX).contains(&bytes) => Ok(bytes),
            _ => {
                let problem = format!(
                    "is {text:?}, expected an amount of memory with its unit, from \"16MiB\" to \"64GiB\", such as \"64MiB\""
                );
                Err(self.refuse(key, problem))
            }
        }
    }

    fn elastic(&mut self) -> Result<Elastic, RecipeError> {
        let min_workers = self.count("elastic.min_workers", 1, WORKERS_MAX)?;
        let max_workers = self.count("elastic.max_workers", 1, WORKERS_MAX)?;
        if min_workers > max_workers {
            return Err(self.refuse(
                "elastic.min_workers",
                format!("is {min_workers}, more than `elastic.max_workers`, which is {max_workers}"),
            ));
        }
        let audit =
            self.real("elastic.audit", "a share from 0 to 1", |share| (0.0..=1.0).contains(&share))?;
        let shard = self.value("parallel.shard")?;
        if audit > 0.0 && shard.as_str() == Some("full") {
            let problem = "needs whole parameters on each worker: `parallel.shard` is \"full\"".to_owned();
            return Err(self.refuse("elastic.audit", problem));
        }
        let audit = (audit * 1e6).ceil() as u32;
        Ok(Elastic { min_workers, max_workers, timeout: self.timeout()?, audit })
    }

    fn timeout(&mut self) -> Result<Duration, RecipeError> {
        let key = "elastic.timeout";
        let text = self.text(key)?;
        let parsed =
            text.parse::<jiff::SignedDuration>().ok().and_then(|length| Duration::try_from(length).ok());
        match parsed {
            Some(timeout) if (TIMEOUT_MIN..=TIMEOUT_MAX).contains(&timeout) => Ok(timeout),
            _ => Err(self.refuse(
                key,
                format!(
                    "is {text:?}, expected a length of time with its unit, \
                from \"100ms\" to \"1h\", such as \"10s\""
                ),
            )),
        }
    }

    /// A whole number in a range.
    fn whole(&mut self, key: &str, least: i64, most: i64) -> Result<i64, RecipeError> {
        let value = self.value(key)?;
        match value.as_integer() {
            Some(number) if (least..=most).contains(&number) => Ok(number),
            Some(number) if most == i64::MAX => {
                Err(self.refuse(key, format!("is {number}, expected {least} or more")))
            }
            Some(number) => Err(self.refuse(key, format!("is {number}, expected {least} to {most}"))),
            None => Err(self.wrong_type(key, "a whole number", &value)),
        }
    }

    /// A whole number in a range that fits in 32 bits.
    fn count(&mut self, key: &str, least: i64, most: i64) -> Result<u32, RecipeError> {
        let number = self.whole(key, least, most)?;
        u32::try_from(number)
            .map_err(|_| self.refuse(key, format!("is {number}, expected at most {}", u32::MAX)))
    }

    /// A finite number that `valid` accepts.
    fn real(&mut self, key: &str, expected: &str, valid: impl Fn(f64) -> bool) -> Result<f64, RecipeError> {
        let value = self.value(key)?;
        match number(&value) {
            Some(number) if number.is_finite() && valid(number) => Ok(number),
            Some(number) => Err(self.refuse(key, format!("is {number}, expected {expected}"))),
            None => Err(self.wrong_type(key, expected, &value)),
        }
    }

    fn text(&mut self, key: &str) -> Result<String, RecipeError> {
        match self.value(key)? {
            Value::String(text) => Ok(text),
            value => Err(self.wrong_type(key, "a text in quotes", &value)),
        }
    }

    fn flag(&mut self, key: &str) -> Result<bool, RecipeError> {
        match self.value(key)? {
            Value::Boolean(flag) => Ok(flag),
            value => Err(self.wrong_type(key, "true or false", &value)),
        }
    }

    /// One of a few names.
    fn choice<T: Copy>(&mut self, key: &str, choices: &[(&str, T)]) -> Result<T, RecipeError> {
        let text = self.text(key)?;
        if let Some((_, choice)) = choices.iter().find(|(name, _)| *name == text) {
            return Ok(*choice);
        }
        let names = || choices.iter().map(|(name, _)| *name);
        let nearest = keys::nearest_of(&text, names()).unwrap_or_default();
        let all: Vec<String> = names().map(|name| format!("{name:?}")).collect();
        Err(self.refuse(key, format!("is {text:?}, expected {}; the nearest is {nearest:?}", all.join(", "))))
    }

    /// What was written, else the default.
    fn value(&mut self, key: &str) -> Result<Value, RecipeError> {
        self.refuse_value_for_section(key)?;
        if let Some(node) = self.tree.get(key) {
            return Ok(node.to_value());
        }
        let missing = |what: &str| RecipeError::Missing {
            path: self.file.to_owned(),
            key: key.to_owned(),
            what: what.to_owned(),
        };
        let known = keys::find(key).ok_or_else(|| missing("no such key"))?;
        let default = known.default.ok_or_else(|| missing(known.what))?;
        let value: Value = default.parse().map_err(|_| missing(known.what))?;
        self.tree.insert(key, Node::Value(value.clone(), Origin::Default));
        Ok(value)
    }

    /// `batch = 32` instead of `[batch]`.
    fn refuse_value_for_section(&self, key: &str) -> Result<(), RecipeError> {
        for (dot, _) in key.match_indices('.') {
            let section = &key[..dot];
            if let Some(Node::Value(value, _)) = self.tree.get(section) {
                return Err(self.wrong_type(section, "a table", value));
            }
        }
        Ok(())
    }

    fn wrong_type(&self, key: &str, expected: &str, value: &Value) -> RecipeError {
        self.refuse(key, format!("is {} ({value}), expected {expected}", described(value)))
    }

    fn refuse(&self, key: &str, problem: impl Into<String>) -> RecipeError {
        let origin = self.tree.get(key).map_or(Origin::Default, |node| node.origin().clone());
        RecipeError::Value { origin, key: key.to_owned(), problem: problem.into() }
    }
}

/// The divisors of `size` on either side of `micro`.
fn nearest_divisors(size: u32, micro: u32) -> String {
    let divides = |candidate: &u32| size.is_multiple_of(*candidate);
    let below = (1..micro.min(size + 1)).rev().find(divides);
    let above = (micro..=size).find(divides);
    let found: Vec<String> = below.into_iter().chain(above).map(|divisor| divisor.to_string()).collect();
    found.join(" or ")
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Float(number) => Some(*number),
        #[expect(clippy::cast_precision_loss, reason = "people write 1 for 1.0, not numbers beyond 2^53")]
        Value::Integer(number) => Some(*number as f64),
        _ => None,
    }
}

fn described(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "a text",
        Value::Integer(_) => "a whole number",
        Value::Float(_) => "a number with a fraction",
        Value::Boolean(_) => "true or false",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => "a table",
    }
}

/// The bytes that a text such as "64MiB" or "2 GiB" says.
fn mebibytes(text: &str) -> Option<u64> {
    let (number, shift) = match (text.strip_suffix("MiB"), text.strip_suffix("GiB")) {
        (Some(number), _) => (number, 20),
        (_, Some(number)) => (number, 30),
        (None, None) => return None,
    };
    number.trim_end().parse::<u32>().ok().map(|number| u64::from(number) << shift)
}

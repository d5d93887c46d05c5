//! What a published dataset is: shards of equal length, named by their hashes, and `dataset.json`, written last.
//!
//! Shard i of a split holds tokens `i * shard_tokens ..`, the last one what is left. Where shards are cut and how many are
//! shuffled together is part of what defines a run's result (`window`), so it is said here and nowhere else.
//!
//! Up to `window` shards a split is one stream of tokens: samples, their order and so all results are those of the same
//! tokens on a local disk. With more, each shard is cut into samples by itself, so that no sample needs two of them;
//! `(shard_tokens - 1) % context + 1` tokens at a shard's end are then in no sample.

use serde::{Deserialize, Serialize};

use crate::fetch::Wanted;
use crate::order::{Cut, SampleOrder};
use crate::{DataError, Manifest};

/// Of [`Published`].
const FORMAT: u32 = 1;
/// Its name in the store.
pub(crate) const FILE: &str = "dataset.json";
/// The tokenizer's.
pub(crate) const TOKENIZER: &str = "tokenizer.json";
/// The longest `dataset.json` that is read: half a million shards.
pub(crate) const FILE_BYTES_MAX: u64 = 64 << 20;
/// The longest tokenizer.
pub(crate) const TOKENIZER_BYTES_MAX: u64 = 64 << 20;
/// The largest shard.
pub(crate) const SHARD_BYTES_MAX: u64 = 1 << 30;
/// The most shards that are shuffled together.
pub(crate) const WINDOW_MAX: u64 = 65_536;

/// How a dataset is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cutting {
    /// Bytes of a shard.
    pub shard_bytes: u64,
    /// Shards that are shuffled together.
    pub window: u64,
}

impl Default for Cutting {
    /// 16 MiB, which a store serves well and which is verified in some milliseconds; 16 of them, so that a step of a
    /// small model is mixed from 128 million tokens, and a cache needs half a gigabyte.
    fn default() -> Self {
        Self { shard_bytes: 16 << 20, window: 16 }
    }
}

/// The two splits of a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// What is trained on.
    Train,
    /// What is not.
    HeldOut,
}

/// What a published dataset is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Published {
    /// Version of this format.
    pub format: u32,
    /// BLAKE3 over the tokens of both splits and the tokenizer, in hex: that of the same dataset on a local disk.
    pub dataset_hash: String,
    /// Source files.
    pub files: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// Tokens of the vocabulary.
    pub vocab: u32,
    /// Bytes of a token in the shards: 2 or 4, little endian.
    pub token_bytes: u8,
    /// Cross entropy in nats per token of the training split under its own unigram distribution.
    pub unigram_loss: f64,
    /// BLAKE3 of `tokenizer.json`, in hex.
    pub tokenizer_hash: String,
    /// Its size.
    pub tokenizer_bytes: u64,
    /// Tokens of a shard.
    pub shard_tokens: u64,
    /// Shards that are shuffled together.
    pub window: u64,
    /// Tokens that are trained on.
    pub train: ShardList,
    /// Tokens that are not.
    pub held_out: ShardList,
    /// BLAKE3, in hex, of this manifest's text with an empty `check`.
    pub check: String,
}

/// A split's shards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardList {
    /// Tokens in all.
    pub tokens: u64,
    /// BLAKE3 of each shard, in hex.
    pub shards: Vec<String>,
}

impl Published {
    /// That of a local dataset; its shards are yet to be named.
    pub fn of(manifest: &Manifest, cutting: Cutting) -> Self {
        let list = |tokens| ShardList { tokens, shards: Vec::new() };
        Self {
            format: FORMAT,
            dataset_hash: manifest.dataset_hash.clone(),
            files: manifest.files,
            bytes: manifest.bytes,
            vocab: manifest.vocab,
            token_bytes: manifest.token_bytes,
            unigram_loss: manifest.unigram_loss,
            tokenizer_hash: manifest.tokenizer_hash.clone(),
            tokenizer_bytes: 0,
            shard_tokens: cutting.shard_bytes / u64::from(manifest.token_bytes.max(1)),
            window: cutting.window,
            train: list(manifest.train.tokens),
            held_out: list(manifest.held_out.tokens),
            check: String::new(),
        }
    }

    /// Reads what lies in a store.
    ///
    /// # Errors
    /// Says in words what is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let version: Version = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if version.format != FORMAT {
            return Err(format!("it has format {}, this program reads {FORMAT}", version.format));
        }
        let published: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if checked(bytes, &published.check) != published.check {
            return Err("it does not have the hash that it says".to_owned());
        }
        published.fault().map_or(Ok(published), Err)
    }

    /// As it lies in the store.
    pub(crate) fn to_json(&self) -> String {
        let bare = Self { check: String::new(), ..self.clone() };
        let bare = serde_json::to_string_pretty(&bare).unwrap_or_default() + "\n";
        let sealed = check_line(&checked(bare.as_bytes(), ""));
        bare.replacen(&check_line(""), &sealed, 1)
    }

    /// What is wrong with it, if anything.
    fn fault(&self) -> Option<String> {
        let hash = |text: &String| {
            text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        };
        let hashes = [&self.dataset_hash, &self.tokenizer_hash].into_iter();
        let mut hashes = hashes.chain(&self.train.shards).chain(&self.held_out.shards);
        let whole = |list: &ShardList| list.tokens.div_ceil(self.shard_tokens) == list.shards.len() as u64;
        self.fault_of_numbers().or_else(|| match () {
            () if !whole(&self.train) || !whole(&self.held_out) => {
                Some("it names more shards than its tokens fill, or fewer".to_owned())
            }
            () => hashes.find(|text| !hash(text)).map(|text| format!("{text:?} is no hash")),
        })
    }

    /// What is wrong with how it is cut, if anything.
    pub(crate) fn fault_of_numbers(&self) -> Option<String> {
        match () {
            () if !matches!(self.token_bytes, 2 | 4) => {
                Some(format!("its tokens have {} bytes, not 2 or 4", self.token_bytes))
            }
            () if self.tokenizer_bytes > TOKENIZER_BYTES_MAX => {
                Some(format!("a tokenizer of {} bytes: {TOKENIZER_BYTES_MAX} at most", self.tokenizer_bytes))
            }
            () if self.shard_tokens < 2 || self.shard_bytes() > SHARD_BYTES_MAX => {
                Some(format!("shards of {} tokens: 2 at least, and 1 GiB at most", self.shard_tokens))
            }
            () if !(1..=WINDOW_MAX).contains(&self.window) => {
                Some(format!("a window of {} shards: 1 at least, {WINDOW_MAX} at most", self.window))
            }
            () => None,
        }
    }

    /// Whether both are the same tokens in the same shards.
    pub(crate) fn is_cut_as(&self, other: &Self) -> bool {
        let cut = |set: &Self| (set.dataset_hash.clone(), set.shard_tokens, set.window);
        cut(self) == cut(other)
    }

    /// Bytes of a full shard.
    pub fn shard_bytes(&self) -> u64 {
        self.shard_tokens.saturating_mul(u64::from(self.token_bytes))
    }

    /// A split's shards.
    pub fn split(&self, split: Split) -> &ShardList {
        match split {
            Split::Train => &self.train,
            Split::HeldOut => &self.held_out,
        }
    }

    /// A split's shards as objects.
    pub(crate) fn wanted(&self, split: Split) -> impl Iterator<Item = Wanted> {
        let list = self.split(split);
        list.shards.iter().zip(0u64..).map(|(hash, shard)| {
            let tokens = (list.tokens - shard * self.shard_tokens).min(self.shard_tokens);
            let bytes = tokens * u64::from(self.token_bytes);
            Wanted { name: shard_name(hash), hash: hash.clone(), bytes }
        })
    }

    /// The smallest cache: what is drawn from, what comes next, and one shard each for held-out samples and for being
    /// fetched.
    pub(crate) fn cache_bytes_min(&self) -> u64 {
        let next = if self.train.shards.len() as u64 > self.window { self.window } else { 0 };
        (self.shards_at_once() + next + 2).saturating_mul(self.shard_bytes())
    }

    /// How samples of `context + 1` tokens lie in the shards; `None` where the training split is one stream of tokens.
    pub fn cut(&self, context: usize) -> Option<Cut> {
        let context = context as u64;
        let of = |tokens: u64| tokens.saturating_sub(1) / context;
        let cut = Cut {
            full: self.train.tokens / self.shard_tokens,
            group: of(self.shard_tokens),
            rest: of(self.train.tokens % self.shard_tokens),
        };
        (self.train.shards.len() as u64 > self.window).then_some(cut)
    }

    /// Training samples of `context + 1` tokens.
    pub fn samples(&self, context: usize) -> u64 {
        match self.cut(context) {
            Some(cut) => cut.samples(),
            None => self.train.tokens.saturating_sub(1) / context as u64,
        }
    }

    /// The first token of a training sample.
    pub(crate) fn first_token(&self, sample: u64, context: usize) -> u64 {
        match self.cut(context) {
            None => sample * context as u64,
            Some(cut) => {
                let (shard, within) = cut.locate(sample);
                shard * self.shard_tokens + within * context as u64
            }
        }
    }

    /// The order of training samples.
    pub fn order(&self, seed: u64, context: usize, size: u32, micro: u32) -> SampleOrder {
        match self.cut(context) {
            None => SampleOrder::new(seed, self.samples(context)),
            Some(cut) => SampleOrder::windowed(seed, cut, self.window, size, micro),
        }
    }

    /// Shards that a run may need at one time.
    pub(crate) fn shards_at_once(&self) -> u64 {
        self.window.min(self.train.shards.len() as u64).max(1)
    }

    /// What defines a run's samples: that of the tokens, and where the order depends on it, of how they are cut.
    pub fn identity(&self) -> String {
        if self.train.shards.len() as u64 <= self.window {
            return self.dataset_hash.clone();
        }
        let text = format!("{} {} {}", self.dataset_hash, self.shard_tokens, self.window);
        blake3::hash(text.as_bytes()).to_hex().to_string()
    }
}

impl std::fmt::Display for Published {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "dataset     {}", self.identity())?;
        writeln!(f, "files       {} ({:.1} MB of text)", self.files, self.bytes as f64 / 1e6)?;
        writeln!(f, "vocabulary  {} tokens, {} bytes each in the shards", self.vocab, self.token_bytes)?;
        let list = |list: &ShardList| format!("{} tokens in {} shards", list.tokens, list.shards.len());
        writeln!(f, "training    {}", list(&self.train))?;
        writeln!(f, "held out    {}", list(&self.held_out))?;
        writeln!(f, "shards      {} tokens each, shuffled {} at a time", self.shard_tokens, self.window)?;
        write!(f, "unigram     {:.4} nats a token", self.unigram_loss)
    }
}

/// The hash of a manifest's text but for the hash that it says. Of the text, for numbers may read otherwise than they were
/// written.
fn checked(text: &[u8], check: &str) -> String {
    let text = String::from_utf8_lossy(text).replacen(&check_line(check), &check_line(""), 1);
    blake3::hash(text.as_bytes()).to_hex().to_string()
}

fn check_line(check: &str) -> String {
    format!("\"check\": \"{check}\"")
}

/// A shard's name in the store.
pub(crate) fn shard_name(hash: &str) -> String {
    format!("shards/{hash}")
}

/// An error about `dataset.json`.
pub(crate) fn unusable(url: String, reason: String) -> DataError {
    DataError::Published { url, reason }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn published() -> Published {
        let hash = |n: u8| format!("{n:02x}").repeat(32);
        Published {
            format: FORMAT,
            dataset_hash: hash(1),
            files: 2,
            bytes: 30,
            vocab: 256,
            token_bytes: 2,
            unigram_loss: 1.5,
            tokenizer_hash: hash(2),
            tokenizer_bytes: 7,
            shard_tokens: 10,
            window: 2,
            train: ShardList { tokens: 25, shards: vec![hash(3), hash(4), hash(5)] },
            held_out: ShardList { tokens: 1, shards: vec![hash(6)] },
            check: String::new(),
        }
    }

    #[test]
    fn the_manifests_bytes_are_pinned() {
        let json = published().to_json();
        assert_eq!(&blake3::hash(json.as_bytes()).to_hex()[..16], "8286aad9b2ec754a");
        let read = Published::parse(json.as_bytes()).unwrap();
        assert_eq!(Published { check: String::new(), ..read }, published());
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let refused = |change: fn(&mut Published), word: &str| {
            let mut changed = published();
            change(&mut changed);
            let error = Published::parse(changed.to_json().as_bytes()).unwrap_err();
            assert!(error.contains(word), "{error}");
        };
        refused(|changed| changed.format = 9, "format 9");
        refused(|changed| changed.token_bytes = 3, "3 bytes");
        refused(|changed| changed.shard_tokens = 0, "shards of 0");
        refused(|changed| changed.shard_tokens = u64::MAX, "1 GiB");
        refused(|changed| changed.window = 0, "window of 0");
        refused(|changed| changed.train.tokens = 31, "more shards");
        refused(|changed| changed.held_out.shards.clear(), "or fewer");
        refused(|changed| changed.train.shards[1] = "../../etc".into(), "no hash");
    }

    #[test]
    fn a_changed_number_is_noticed() {
        let json = published().to_json().replace("\"window\": 2", "\"window\": 1");
        assert!(Published::parse(json.as_bytes()).unwrap_err().contains("hash"));
    }

    #[test]
    fn up_to_a_window_of_shards_the_split_is_one_stream() {
        let few = Published { window: 3, ..published() };
        assert_eq!((few.cut(4), few.samples(4)), (None, 6));
        assert_eq!(few.order(7, 4, 2, 1), SampleOrder::new(7, 6), "as on a local disk");
        assert_eq!(few.identity(), few.dataset_hash);
        let many = published();
        assert_eq!(many.cut(4), Some(Cut { full: 2, group: 2, rest: 1 }));
        assert_eq!((many.first_token(2, 4), many.first_token(4, 4)), (10, 20));
        assert_ne!(many.identity(), many.dataset_hash);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_manifest_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Published::parse(&bytes);
        }

        /// Damage in the middle of a sound manifest is refused, whatever it hits.
        #[test]
        fn a_damaged_manifest_is_refused(at in 0usize..900, with in any::<u8>()) {
            let mut json = published().to_json().into_bytes();
            let at = at % json.len();
            prop_assume!(json[at] != with);
            json[at] = with;
            if let Ok(read) = Published::parse(&json) {
                prop_assert!(false, "{read:?}");
            }
        }

        /// No number in a manifest that says its own hash makes a sample lie outside its shards.
        #[test]
        fn samples_lie_in_their_shards(
            shard_tokens in 2u64..50, window in 1u64..6, shards in 1u64..20, last in 1u64..50, context in 1usize..60,
        ) {
            let tokens = (shards - 1) * shard_tokens + last.min(shard_tokens);
            let list = ShardList { tokens, shards: vec!["ab".repeat(32); shards as usize] };
            let set = Published { shard_tokens, window, train: list, ..published() };
            prop_assert_eq!(set.fault(), None);
            for sample in 0..set.samples(context) {
                let first = set.first_token(sample, context);
                prop_assert!(first + (context as u64) < tokens);
                if set.cut(context).is_some() {
                    prop_assert_eq!(first / shard_tokens, (first + context as u64) / shard_tokens);
                }
            }
        }
    }
}

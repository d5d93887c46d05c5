//! Builds a dataset once, and opens it from then on.
//!
//! A dataset's folder is named by the BLAKE3 of all that goes into it: contents and names of the files, tokenizer,
//! split. A changed file is another dataset. Building happens in a folder of its own that is renamed at the end, the
//! manifest in it: what is there is whole, and of two processes that race the first to finish wins.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::config::{TokenizerConfig, TokenizerFile, TokenizerKind};
use crate::manifest::{self, FORMAT, Shard};
use crate::sources::{SourceFile, sources};
use crate::{DataError, Manifest, TextConfig, Tokenizer, Tokens};

/// Longest stretch of tokens that goes to one split as a whole.
const RUN_TOKENS_MAX: usize = 4096;
/// Shortest, for small corpora.
const RUN_TOKENS_MIN: usize = 64;
/// Stretches that a corpus is cut into at least, so that one percent is something.
const RUNS_MIN: usize = 200;
/// Between documents.
const SEPARATOR: &str = "\n";
/// Documents that are encoded at once, in parallel.
const BATCH_DOCUMENTS: usize = 64;

/// What a build is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Reading and hashing files.
    Reading {
        /// Files in all.
        files: usize,
    },
    /// Training the tokenizer.
    Training {
        /// Tokens of the vocabulary.
        vocab: u32,
    },
    /// Turning text into tokens.
    Encoding {
        /// Files done.
        done: usize,
        /// Files in all.
        files: usize,
    },
}

impl std::fmt::Display for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Reading { files } => write!(f, "reading {files} files"),
            Self::Training { vocab } => write!(f, "training a tokenizer of {vocab} tokens"),
            Self::Encoding { done, files } => write!(f, "tokenising: {done} of {files} files"),
        }
    }
}

/// An opened dataset.
#[derive(Debug)]
pub struct Corpus {
    /// What it is.
    pub manifest: Manifest,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Tokens that are trained on.
    pub train: Tokens,
    /// Tokens that are not.
    pub held_out: Tokens,
    folder: PathBuf,
}

impl Corpus {
    /// Where it lies.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Compares both shards with their hashes.
    ///
    /// # Errors
    /// [`DataError::Damaged`] names the shard.
    pub fn verify(&self) -> Result<(), DataError> {
        self.train.verify()?;
        self.held_out.verify()
    }

    /// Opens what was built in a folder; `None` where there is nothing, or something of another format.
    ///
    /// # Errors
    /// Where it is damaged.
    pub fn open(folder: PathBuf) -> Result<Option<Self>, DataError> {
        let Some(manifest) = Manifest::read(&folder)? else { return Ok(None) };
        let tokenizer = Tokenizer::from_file(&folder.join(TOKENIZER))?;
        let train = Tokens::open(&folder, &manifest.train, manifest.token_bytes)?;
        let held_out = Tokens::open(&folder, &manifest.held_out, manifest.token_bytes)?;
        Ok(Some(Self { manifest, tokenizer, train, held_out, folder }))
    }
}

const TOKENIZER: &str = "tokenizer.json";

/// Opens the dataset that the configuration and the files' contents name, in `cache`; builds it where it is not there.
///
/// # Errors
/// See [`DataError`].
pub fn open_or_build(
    config: &TextConfig,
    cache: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<Corpus, DataError> {
    if !(0.0..=0.5).contains(&config.held_out) {
        let reason = format!("held_out = {} is not between 0 and 0.5", config.held_out);
        return Err(DataError::Pattern { pattern: String::new(), reason });
    }
    let documents = read(&sources(&config.text)?, progress)?;
    let given = match &config.tokenizer {
        TokenizerConfig::File(TokenizerFile { file }) => Some(Tokenizer::from_file(file)?),
        TokenizerConfig::Kind(_) => None,
    };
    let folder = cache.join(key(config, given.as_ref(), &documents));
    if let Some(corpus) = Corpus::open(folder.clone())? {
        return Ok(corpus);
    }
    let making = workshop(cache)?;
    let built = build(config, given, &documents, &making, progress).and_then(|()| publish(&making, &folder));
    if built.is_err() {
        // The first error is the one to tell.
        let _ = fs::remove_dir_all(&making);
    }
    built?;
    Corpus::open(folder.clone())?.ok_or_else(|| {
        let reason = format!("it holds no {} of format {FORMAT}", manifest::FILE);
        DataError::Damaged { folder, reason }
    })
}

/// A fresh folder to build in.
fn workshop(cache: &Path) -> Result<PathBuf, DataError> {
    fs::create_dir_all(cache).map_err(DataError::io("create", cache))?;
    for attempt in 0.. {
        let folder = cache.join(format!("making-{}-{attempt}", std::process::id()));
        match fs::create_dir(&folder) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            result => return result.map(|()| folder.clone()).map_err(DataError::io("create", &folder)),
        }
    }
    unreachable!("some number is free")
}

struct Document {
    name: String,
    text: String,
}

fn read(files: &[SourceFile], progress: &mut dyn FnMut(Progress)) -> Result<Vec<Document>, DataError> {
    progress(Progress::Reading { files: files.len() });
    let document = |file: &SourceFile| {
        let bytes = fs::read(&file.path).map_err(DataError::io("read", &file.path))?;
        let text = String::from_utf8(bytes).map_err(|error| DataError::NotText {
            path: file.path.clone(),
            at: error.utf8_error().valid_up_to(),
        })?;
        Ok(Document { name: file.name.clone(), text })
    };
    files.iter().map(document).collect()
}

/// The hash of all that goes into a dataset, each part with its length.
fn key(config: &TextConfig, given: Option<&Tokenizer>, documents: &[Document]) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut part = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    part(&FORMAT.to_le_bytes());
    part(&config.held_out.to_bits().to_le_bytes());
    match (&config.tokenizer, given) {
        (_, Some(tokenizer)) => part(tokenizer.json()),
        (tokenizer, None) => part(format!("{tokenizer:?}").as_bytes()),
    }
    for document in documents {
        part(document.name.as_bytes());
        part(document.text.as_bytes());
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

fn build(
    config: &TextConfig,
    given: Option<Tokenizer>,
    documents: &[Document],
    folder: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), DataError> {
    let tokenizer = match (given, &config.tokenizer) {
        (Some(tokenizer), _) => tokenizer,
        (None, TokenizerConfig::Kind(TokenizerKind::Bpe { vocab })) => {
            progress(Progress::Training { vocab: *vocab });
            let texts: Vec<&str> = documents.iter().map(|document| document.text.as_str()).collect();
            Tokenizer::train(&texts, *vocab)?
        }
        (None, _) => Tokenizer::bytes()?,
    };
    let tokens = encode(&tokenizer, documents, progress)?;
    let (train, held_out) = split(&tokens, config.held_out);
    let token_bytes = if tokenizer.vocab() <= 1 << 16 { 2 } else { 4 };
    let unigram_loss = entropy(&train);
    let train = write_shard(folder, "train.tokens", &train, token_bytes)?;
    let held_out = write_shard(folder, "held_out.tokens", &held_out, token_bytes)?;
    write(&folder.join(TOKENIZER), tokenizer.json())?;
    let tokenizer_hash = blake3::hash(tokenizer.json()).to_hex().to_string();
    let identity = [&train.blake3, &held_out.blake3, &tokenizer_hash].map(String::as_str).join(" ");
    let manifest = Manifest {
        format: FORMAT,
        dataset_hash: blake3::hash(identity.as_bytes()).to_hex().to_string(),
        files: documents.len() as u64,
        bytes: documents.iter().map(|document| document.text.len() as u64).sum(),
        vocab: tokenizer.vocab() as u32,
        token_bytes,
        unigram_loss,
        tokenizer_hash,
        train,
        held_out,
    };
    write(&folder.join(manifest::FILE), manifest.to_json().as_bytes())
}

/// All documents' tokens in order, a separator after each.
fn encode(
    tokenizer: &Tokenizer,
    documents: &[Document],
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<u32>, DataError> {
    let separator = tokenizer.encode(SEPARATOR)?;
    let mut tokens = Vec::new();
    for (index, batch) in documents.chunks(BATCH_DOCUMENTS).enumerate() {
        progress(Progress::Encoding { done: index * BATCH_DOCUMENTS, files: documents.len() });
        let texts = batch.iter().map(|document| document.text.as_str()).collect();
        for encoded in tokenizer.encode_all(texts)? {
            tokens.extend(encoded);
            tokens.extend(&separator);
        }
    }
    Ok(tokens)
}

/// Cuts the corpus into runs and gives each to one split, so that the held-out share is spread evenly.
fn split(tokens: &[u32], held_out: f64) -> (Vec<u32>, Vec<u32>) {
    let run = (tokens.len() / RUNS_MIN).clamp(RUN_TOKENS_MIN, RUN_TOKENS_MAX);
    let (mut train, mut out) = (Vec::new(), Vec::new());
    for (index, run) in tokens.chunks(run).enumerate() {
        let share = |runs: usize| (runs as f64 * held_out).floor();
        let split = if share(index + 1) > share(index) { &mut out } else { &mut train };
        split.extend_from_slice(run);
    }
    (train, out)
}

/// Entropy in nats of the tokens' distribution: what a unigram model of them loses per token.
fn entropy(tokens: &[u32]) -> f64 {
    let mut counts = BTreeMap::<u32, u64>::new();
    tokens.iter().for_each(|token| *counts.entry(*token).or_default() += 1);
    let total = tokens.len() as f64;
    counts.values().map(|&count| count as f64 / total).fold(0.0, |sum, p| sum - p * libm::log(p))
}

fn write_shard(folder: &Path, file: &str, tokens: &[u32], token_bytes: u8) -> Result<Shard, DataError> {
    let bytes: Vec<u8> = match token_bytes {
        2 => tokens.iter().flat_map(|&token| (token as u16).to_le_bytes()).collect(),
        _ => tokens.iter().flat_map(|&token| token.to_le_bytes()).collect(),
    };
    write(&folder.join(file), &bytes)?;
    Ok(Shard {
        file: file.to_owned(),
        tokens: tokens.len() as u64,
        blake3: blake3::hash(&bytes).to_hex().to_string(),
    })
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), DataError> {
    fs::write(path, bytes).map_err(DataError::io("write", path))
}

/// Gives the finished folder its name; where another process was faster, its work is used.
fn publish(making: &Path, folder: &Path) -> Result<(), DataError> {
    match fs::rename(making, folder) {
        Err(error) if matches!(error.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists) => {
            fs::remove_dir_all(making).map_err(DataError::io("remove", making))
        }
        result => result.map_err(DataError::io("rename", making)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        folder: tempfile::TempDir,
    }

    impl Bench {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            for file in 0..3 {
                let text = format!("file {file}: the ring carries every gradient once. ").repeat(60);
                fs::write(folder.path().join(format!("{file}.txt")), text).unwrap();
            }
            Self { folder }
        }

        fn config(&self, tokenizer: TokenizerKind) -> TextConfig {
            let text = vec![format!("{}/*.txt", self.folder.path().display())];
            TextConfig { text, tokenizer: TokenizerConfig::Kind(tokenizer), held_out: 0.05 }
        }

        fn open(&self, tokenizer: TokenizerKind) -> (Corpus, bool) {
            let mut built = false;
            let cache = self.folder.path().join("cache");
            let mut progress = |state| built |= matches!(state, Progress::Encoding { .. });
            let corpus = open_or_build(&self.config(tokenizer), &cache, &mut progress).unwrap();
            (corpus, built)
        }
    }

    #[test]
    fn a_dataset_is_built_once_and_again_when_a_file_changes() {
        let bench = Bench::new();
        let (first, built) = bench.open(TokenizerKind::Bytes {});
        assert!(built);
        let (second, built) = bench.open(TokenizerKind::Bytes {});
        assert!(!built);
        assert_eq!(first.manifest, second.manifest);
        fs::write(bench.folder.path().join("0.txt"), "something else").unwrap();
        let (third, built) = bench.open(TokenizerKind::Bytes {});
        assert!(built);
        assert_ne!(third.manifest.dataset_hash, first.manifest.dataset_hash);
    }

    #[test]
    fn the_dataset_is_pinned_to_the_bit() {
        let hash = |kind| Bench::new().open(kind).0.manifest.dataset_hash[..16].to_owned();
        assert_eq!(hash(TokenizerKind::Bytes {}), "f29ef1dbef4218e3");
        assert_eq!(hash(TokenizerKind::Bpe { vocab: 290 }), "4b8a9b5d2c32de40");
    }

    #[test]
    fn both_splits_together_are_the_corpus() {
        let (corpus, _) = Bench::new().open(TokenizerKind::Bytes {});
        assert_eq!(corpus.train.len() + corpus.held_out.len(), corpus.manifest.bytes + 3, "a separator each");
        let share = corpus.held_out.len() as f64 / corpus.train.len() as f64;
        assert!((0.03..0.07).contains(&share), "{share}");
        let mut window = Vec::new();
        corpus.train.window(1, 10, &mut window);
        let text: Vec<u32> = window.iter().map(|&token| token as u32).collect();
        assert_eq!(corpus.tokenizer.decode(&text).unwrap(), "e ring carr");
    }

    #[test]
    fn a_truncated_shard_is_an_error_that_says_what_to_do() {
        let bench = Bench::new();
        let (corpus, _) = bench.open(TokenizerKind::Bytes {});
        corpus.verify().unwrap();
        let shard = corpus.folder().join("train.tokens");
        let mut bytes = fs::read(&shard).unwrap();
        bytes[3] ^= 1;
        fs::write(&shard, &bytes).unwrap();
        assert!(corpus.verify().unwrap_err().to_string().contains("train.tokens"));
        fs::write(&shard, &bytes[..100]).unwrap();
        let cache = bench.folder.path().join("cache");
        let error = open_or_build(&bench.config(TokenizerKind::Bytes {}), &cache, &mut |_| ()).unwrap_err();
        assert!(
            error.to_string().contains("train.tokens") && error.to_string().contains("remove"),
            "{error}"
        );
    }

    #[test]
    fn builders_that_race_agree() {
        let bench = Bench::new();
        let hashes: Vec<String> = std::thread::scope(|scope| {
            let open = || bench.open(TokenizerKind::Bytes {}).0.manifest.dataset_hash;
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(open)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(hashes.windows(2).all(|pair| pair[0] == pair[1]));
        let left = fs::read_dir(bench.folder.path().join("cache")).unwrap().count();
        assert_eq!(left, 1, "no half-made folder stays behind");
    }

    #[test]
    fn entropy_is_that_of_the_distribution() {
        assert!((entropy(&[1, 2, 3, 4]) - 4f64.ln()).abs() < 1e-12);
        assert_eq!(entropy(&[7, 7]), 0.0);
    }

    #[test]
    fn what_is_no_text_is_named() {
        let bench = Bench::new();
        fs::write(bench.folder.path().join("bad.txt"), [b'a', 0xff]).unwrap();
        let cache = bench.folder.path().join("cache");
        let error = open_or_build(&bench.config(TokenizerKind::Bytes {}), &cache, &mut |_| ()).unwrap_err();
        assert!(error.to_string().contains("bad.txt") && error.to_string().contains("byte 1"), "{error}");
    }
}

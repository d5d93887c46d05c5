//! Weights to start from: GPT-2 in Hugging Face's layout, as `transformers` writes it and as our checkpoints have it.
//!
//! Everything that can be compared is compared when they are opened, before a run begins: the configuration with the
//! model's, and names, shapes and types of all tensors. Elements are read when the state is made of them.

use mattock_checkpoint::{Foreign, ForeignError, Layout, LayoutError, Location, LocationError, TensorMeta};
use mattock_kernels::Cpu;

use super::GptConfig;
use super::model::blocks;
use crate::params::Space;
use crate::plan::Table;
use crate::task::TaskError;

/// The output projection, which lies beside the model proper.
const LM_HEAD: &str = "lm_head.weight";
const CONFIG: &str = "config.json";

/// Why weights cannot be started from.
#[derive(Debug, thiserror::Error)]
pub(super) enum PretrainedError {
    /// The address is none.
    #[error("{}", .0.to_string().replace("a place for checkpoints", "a place for weights"))]
    Location(#[from] LocationError),
    /// They cannot be read, or have other tensors.
    #[error(transparent)]
    Foreign(#[from] ForeignError),
    /// They are of another model.
    #[error("{url}/{CONFIG}: {why}")]
    Config { url: String, why: String },
    /// The head is another than the embedding, in a model in which they are one.
    #[error(
        "{url}: {LM_HEAD} is not wte.weight, though {CONFIG} says that they are one (tie_word_embeddings)"
    )]
    Untied { url: String },
    /// They are not those that the run began with.
    #[error(
        "{url}: the BLAKE3 of its weights is {found}, model.init_hash is {wanted}: the files changed, or differ between hosts"
    )]
    Hash { url: String, found: String, wanted: String },
    /// Our own tensors do not fit together: a bug.
    #[error("the model cannot be laid out: {0}; this is a bug")]
    Layout(#[from] LayoutError),
}

/// Weights whose headers fit the model.
pub(super) struct Pretrained {
    foreign: Foreign,
    url: String,
    /// What the recipe says of their bytes.
    hash: Option<String>,
}

/// The hash of the weights that a recipe's `[model]` starts from, where it names some and does not say it: what a run's
/// recipe says, all its workers compare.
///
/// # Errors
/// Where they cannot be read.
pub fn missing_hash(model: &Table) -> Result<Option<String>, TaskError> {
    let text = |key: &str| model.get(key).and_then(serde_json::Value::as_str);
    let (Some("gpt"), Some(init), None) = (text("family"), text("init"), text("init_hash")) else {
        return Ok(None);
    };
    let hash = || Ok::<_, PretrainedError>(Foreign::open(&Location::parse(init)?)?.hash()?);
    let fault =
        |error: PretrainedError| TaskError::Table { table: "model", reason: format!("init: {error}") };
    hash().map(Some).map_err(fault)
}

impl Pretrained {
    /// Opens weights for this model.
    pub(super) fn open(url: &str, config: &GptConfig, vocab: usize) -> Result<Self, PretrainedError> {
        let (pretrained, theirs, their_vocab) = Self::read(url)?;
        if let Some(why) = config.disagreement(vocab, &theirs, their_vocab) {
            return Err(PretrainedError::Config { url: pretrained.url, why });
        }
        Self { hash: config.init_hash.clone(), ..pretrained }.checked(config, vocab)
    }

    /// Opens weights for the model that their configuration tells of; returns it, and the vocabulary.
    pub(super) fn open_any(url: &str) -> Result<(Self, GptConfig, usize), PretrainedError> {
        let (pretrained, config, vocab) = Self::read(url)?;
        Ok((pretrained.checked(&config, vocab)?, config, vocab))
    }

    fn read(url: &str) -> Result<(Self, GptConfig, usize), PretrainedError> {
        let location = Location::parse(url)?;
        let foreign = Foreign::open(&location)?;
        let text = foreign.text(CONFIG)?;
        let pretrained = Self { foreign, url: location.to_string(), hash: None };
        match GptConfig::from_hugging_face(&text) {
            Ok((config, vocab)) => Ok((pretrained, config, vocab)),
            Err(why) => Err(PretrainedError::Config { url: pretrained.url, why }),
        }
    }

    fn checked(self, config: &GptConfig, vocab: usize) -> Result<Self, PretrainedError> {
        // Before the model is made: one that no memory holds is refused here.
        let (wanted, found) = (config.parameters_at_least(vocab), self.foreign.elements());
        if wanted > found {
            let why = format!("it tells of at least {wanted} parameters, the weights have {found} elements");
            return Err(PretrainedError::Config { url: self.url, why });
        }
        self.foreign.check(&self.layout(&space(config, vocab))?, meaning)?;
        Ok(self)
    }

    /// What lies beside them as `tokenizer.json`.
    pub(super) fn tokenizer(&self) -> Result<String, PretrainedError> {
        Ok(self.foreign.text("tokenizer.json")?)
    }

    /// The parameters, over the flat space of the model.
    pub(super) fn load(&self, space: &Space) -> Result<Vec<f32>, PretrainedError> {
        let (mut flat, found) = self.foreign.load(&self.layout(space)?, meaning)?;
        if let Some(wanted) = self.hash.as_ref().filter(|wanted| **wanted != found) {
            return Err(PretrainedError::Hash { url: self.url.clone(), found, wanted: wanted.clone() });
        }
        let head = flat.split_off(space.len());
        let embedding = space.parameters().iter().find(|parameter| parameter.name == "wte.weight");
        let tied = embedding.is_some_and(|embedding| flat[embedding.range()] == head[..]);
        if !head.is_empty() && !tied {
            return Err(PretrainedError::Untied { url: self.url.clone() });
        }
        Ok(flat)
    }

    /// The model's tensors; behind them the output projection, where it is there although it is the embedding.
    fn layout(&self, space: &Space) -> Result<Layout, PretrainedError> {
        let parameters = space.parameters();
        let mut tensors: Vec<TensorMeta> = parameters
            .iter()
            .map(|parameter| TensorMeta {
                name: parameter.name.clone(),
                shape: parameter.shape.clone(),
                offset: parameter.offset,
            })
            .collect();
        let mut elements = space.len();
        let embedding = parameters.iter().find(|parameter| parameter.name == "wte.weight");
        let tied = parameters.iter().all(|parameter| parameter.name != LM_HEAD);
        if let Some(embedding) = embedding.filter(|_| tied && self.foreign.has(LM_HEAD)) {
            let shape = embedding.shape.clone();
            tensors.push(TensorMeta { name: LM_HEAD.to_owned(), shape, offset: elements });
            elements += embedding.len();
        }
        Ok(Layout::new(tensors, elements)?)
    }
}

/// Where the parameters of such a model lie.
pub(super) fn space(config: &GptConfig, vocab: usize) -> Space {
    let device = Default::default();
    let blocks = blocks::<Cpu>(config, vocab, None, &device);
    Space::of(blocks, |index| config.prefix(index))
}

/// Which of our parameters a name stands for; none for what attention keeps beside its weights, a mask.
fn meaning(name: &str) -> Option<String> {
    let bare = name.strip_prefix("transformer.").unwrap_or(name);
    let in_block = bare.strip_prefix("h.").and_then(|rest| rest.split_once('.'));
    let is_mask = in_block.is_some_and(|(_, of_block)| ["attn.bias", "attn.masked_bias"].contains(&of_block));
    (!is_mask).then(|| bare.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_and_without_the_prefix_are_ours_and_masks_are_passed_over() {
        for (theirs, ours) in [
            ("transformer.h.11.attn.c_attn.bias", Some("h.11.attn.c_attn.bias")),
            ("h.0.attn.c_attn.bias", Some("h.0.attn.c_attn.bias")),
            ("transformer.h.0.attn.bias", None),
            ("h.3.attn.masked_bias", None),
            ("lm_head.weight", Some("lm_head.weight")),
            ("score.bias", Some("score.bias")),
        ] {
            assert_eq!(meaning(theirs).as_deref(), ours);
        }
    }
}

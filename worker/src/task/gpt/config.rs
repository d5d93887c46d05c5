//! The `[model]` table of the built-in language model.

use serde::{Deserialize, Serialize};

/// Shape of a decoder-only language model as GPT-2 has it: learned positions, pre-norm, GELU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GptConfig {
    /// `gpt`.
    pub family: Family,
    /// Decoder blocks.
    pub layers: usize,
    /// Attention heads; divides `dim`.
    pub heads: usize,
    /// Width of the residual stream.
    pub dim: usize,
    /// Tokens that the model sees at once.
    pub context: usize,
    /// Whether the head is the transpose of the token embedding.
    #[serde(default = "tied")]
    pub tied: bool,
    /// Probability by which residual branches and embeddings are dropped in training.
    #[serde(default)]
    pub dropout: f64,
    /// Folder or URL of GPT-2 weights in Hugging Face's layout to start from; without one they are drawn from the seed.
    #[serde(default)]
    pub init: Option<String>,
    /// BLAKE3 of these weights' files, in the order of their names; filled in where a run starts.
    #[serde(default)]
    pub init_hash: Option<String>,
}

/// The built-in model families.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// GPT-2's shape.
    Gpt,
}

fn tied() -> bool {
    true
}

impl GptConfig {
    /// What the parameters of a block are called by, in Hugging Face's GPT-2.
    pub(super) fn prefix(&self, index: usize) -> String {
        if (1..=self.layers).contains(&index) { format!("h.{}", index - 1) } else { String::new() }
    }

    /// What is wrong with the numbers, if anything.
    pub(super) fn fault(&self) -> Option<String> {
        let Self { layers, heads, dim, context, dropout, .. } = *self;
        match () {
            () if layers == 0 || heads == 0 || dim == 0 || context == 0 => {
                Some("layers, heads, dim and context must all be at least 1".to_owned())
            }
            () if !dim.is_multiple_of(heads) => Some(format!(
                "dim = {dim} is not divisible by heads = {heads}: choose a dim that is a multiple of it"
            )),
            () if !(0.0..1.0).contains(&dropout) => {
                Some(format!("dropout = {dropout} is not a probability below 1"))
            }
            () if self.init.is_none() && self.init_hash.is_some() => {
                Some("init_hash is the hash of the weights in init, which is not set".to_owned())
            }
            () => None,
        }
    }

    /// `config.json` as Hugging Face's `GPT2LMHeadModel` reads it.
    pub(super) fn hugging_face(&self, vocab: usize) -> String {
        let json = serde_json::json!({
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_embd": self.dim,
            "n_positions": self.context,
            "n_ctx": self.context,
            "n_inner": null,
            "vocab_size": vocab,
            "layer_norm_epsilon": super::model::NORM_EPSILON,
            "embd_pdrop": self.dropout,
            "resid_pdrop": self.dropout,
            "attn_pdrop": 0.0,
            "initializer_range": super::model::INITIAL_STD,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "float32",
            // Else it has those of GPT-2's own vocabulary, which a smaller one has not.
            "bos_token_id": null,
            "eos_token_id": null,
        });
        format!("{json:#}\n")
    }

    /// Reads back what a checkpoint of ours has in `config.json`; returns the configuration and the vocabulary.
    pub fn from_hugging_face(text: &str) -> Result<(Self, usize), String> {
        let json: serde_json::Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let number = |key: &str| {
            let value = json.get(key).and_then(serde_json::Value::as_u64);
            value.and_then(|value| usize::try_from(value).ok()).ok_or_else(|| format!("no number '{key}'"))
        };
        let config = Self {
            family: Family::Gpt,
            layers: number("n_layer")?,
            heads: number("n_head")?,
            dim: number("n_embd")?,
            context: number("n_positions")?,
            tied: json.get("tie_word_embeddings").and_then(serde_json::Value::as_bool).unwrap_or(true),
            dropout: 0.0,
            init: None,
            init_hash: None,
        };
        match config.fault().or_else(|| config.foreign_fault(&json)) {
            Some(fault) => Err(fault),
            None => Ok((config, number("vocab_size")?)),
        }
    }

    /// How many parameters its matrices have; saturates.
    pub(super) fn parameters_at_least(&self, vocab: usize) -> usize {
        let rows = (12_usize.saturating_mul(self.layers).saturating_mul(self.dim))
            .saturating_add(vocab)
            .saturating_add(self.context);
        rows.saturating_mul(self.dim)
    }

    /// What a configuration of Hugging Face's asks for that this model computes otherwise; what it leaves out is as in GPT-2.
    fn foreign_fault(&self, json: &serde_json::Value) -> Option<String> {
        let only = [
            ("model_type", vec!["gpt2".into()]),
            ("activation_function", vec!["gelu_new".into(), "gelu_pytorch_tanh".into()]),
            ("layer_norm_epsilon", vec![super::model::NORM_EPSILON.into()]),
            ("n_inner", vec![(4 * self.dim).into(), serde_json::Value::Null]),
            ("scale_attn_weights", vec![true.into()]),
            ("scale_attn_by_inverse_layer_idx", vec![false.into()]),
            ("add_cross_attention", vec![false.into()]),
        ];
        only.into_iter().find_map(|(key, allowed): (_, Vec<serde_json::Value>)| {
            let found = json.get(key).filter(|found| !allowed.contains(found))?;
            Some(format!("{key} is {found}, which this model has not: it has {}", allowed[0]))
        })
    }

    /// The first number in which a configuration of Hugging Face's is not this one.
    pub(super) fn disagreement(&self, vocab: usize, theirs: &Self, their_vocab: usize) -> Option<String> {
        let numbers = [
            ("n_layer", theirs.layers, "model.layers", self.layers),
            ("n_head", theirs.heads, "model.heads", self.heads),
            ("n_embd", theirs.dim, "model.dim", self.dim),
            ("n_positions", theirs.context, "model.context", self.context),
            ("vocab_size", their_vocab, "the vocabulary of the data's tokenizer", vocab),
        ];
        let differs = numbers.into_iter().find(|(_, theirs, _, ours)| theirs != ours);
        let numbers = differs.map(|(key, theirs, name, ours)| format!("{key} is {theirs}, {name} is {ours}"));
        let tied = || {
            (theirs.tied != self.tied)
                .then(|| format!("tie_word_embeddings is {}, model.tied is {}", theirs.tied, self.tied))
        };
        numbers.or_else(tied)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_survives_hugging_faces_form() {
        let config = GptConfig {
            family: Family::Gpt,
            layers: 3,
            heads: 2,
            dim: 8,
            context: 5,
            tied: false,
            dropout: 0.0,
            init: None,
            init_hash: None,
        };
        assert_eq!(GptConfig::from_hugging_face(&config.hugging_face(17)), Ok((config, 17)));
    }

    #[test]
    fn heads_must_divide_the_width() {
        let config = GptConfig {
            family: Family::Gpt,
            layers: 3,
            heads: 3,
            dim: 8,
            context: 5,
            tied: true,
            dropout: 0.0,
            init: None,
            init_hash: None,
        };
        assert!(config.fault().unwrap().contains("not divisible"));
    }
}

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
        };
        match config.fault() {
            Some(fault) => Err(fault),
            None => Ok((config, number("vocab_size")?)),
        }
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
        };
        assert!(config.fault().unwrap().contains("not divisible"));
    }
}

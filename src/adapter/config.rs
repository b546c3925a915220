//! `adapter_config.json`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Error, Result};
use crate::base::DecoderSpec;

/// The layout of `adapter_config.json` that this version writes.
pub const FORMAT_VERSION: u32 = 1;

/// What an adapter is. Only `method`, `num_layers`, `num_heads` and `head_dim` are required in a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AdapterConfig {
    /// Version of this layout.
    #[serde(default = "format_version")]
    pub format_version: u32,
    /// The method.
    pub method: Method,
    /// The model that the adapter was trained for, for people; shapes decide whether it fits.
    #[serde(default)]
    pub base_model: Option<String>,
    /// Decoder layers of the base model.
    pub num_layers: usize,
    /// Query heads of the base model.
    pub num_heads: usize,
    /// Key-value heads of the base model; as many as query heads where not given.
    #[serde(default)]
    pub num_kv_heads: Option<usize>,
    /// Width of a head.
    pub head_dim: usize,
    /// φ in `φ(q)ᵀ M`.
    #[serde(default)]
    pub feature_map: FeatureMap,
    /// Which query φ sees.
    #[serde(default)]
    pub query: Query,
    /// What shares an M.
    #[serde(default)]
    pub sharing: Sharing,
    /// The rank of M where it is a product of two factors; full where not given.
    #[serde(default)]
    pub rank: Option<usize>,
    /// A learned factor on the term.
    #[serde(default)]
    pub gate: Gate,
    /// Whether the term is divided by a learned `φ(q)ᵀ k` (NTK-Attention, arXiv 2406.14036).
    #[serde(default)]
    pub normalizer: bool,
    /// The layers that are adapted; all where not given.
    #[serde(default)]
    pub layers: Option<Vec<usize>>,
}

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Prefix-Tuning+ (arXiv 2506.13674, Eq. 7).
    PrefixPlus,
}

/// φ in `φ(q)ᵀ M`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FeatureMap {
    /// `x` where positive, else `exp(x) − 1`.
    #[default]
    Elu,
}

/// Which query φ sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Query {
    /// The query that meets the keys: after QK-norm and RoPE, before the scaling.
    #[default]
    PostRope,
}

/// What shares an M.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sharing {
    /// Every query head has its own.
    #[default]
    Head,
}

/// A learned factor on the term.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// The term is added as it is.
    #[default]
    None,
}

fn format_version() -> u32 {
    FORMAT_VERSION
}

impl AdapterConfig {
    /// Prefix-Tuning+ with its defaults for a base model.
    pub fn prefix_plus(spec: &DecoderSpec, base_model: Option<String>) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            method: Method::PrefixPlus,
            base_model,
            num_layers: spec.num_layers,
            num_heads: spec.attention.num_heads,
            num_kv_heads: Some(spec.attention.num_kv_heads),
            head_dim: spec.attention.head_dim,
            feature_map: FeatureMap::Elu,
            query: Query::PostRope,
            sharing: Sharing::Head,
            rank: None,
            gate: Gate::None,
            normalizer: false,
            layers: None,
        }
    }

    /// The adapted layers in ascending order.
    pub fn adapted_layers(&self) -> Vec<usize> {
        match &self.layers {
            Some(layers) => {
                let mut layers = layers.clone();
                layers.sort_unstable();
                layers.dedup();
                layers
            }
            None => (0..self.num_layers).collect(),
        }
    }

    /// Whether the configuration is one that this version computes.
    ///
    /// # Errors
    /// Names the field that it is not.
    pub fn check(&self) -> Result<()> {
        let fail = |field: &'static str, why: String, help: &'static str| Err(Error::Config { field, why, help });
        if self.format_version > FORMAT_VERSION {
            return fail(
                "format_version",
                format!("is {}, this prefold knows up to {FORMAT_VERSION}", self.format_version),
                "use the prefold that wrote the adapter, or a newer one",
            );
        }
        for (field, value) in
            [("num_layers", self.num_layers), ("num_heads", self.num_heads), ("head_dim", self.head_dim)]
        {
            if value == 0 || value > 1 << 20 {
                return fail(field, format!("is {value}"), "it is a count of the base model");
            }
        }
        if let Some(rank) = self.rank {
            return fail("rank", format!("is {rank}"), "low rank is not supported yet; leave it out");
        }
        if self.normalizer {
            return fail("normalizer", "is true".into(), "the normaliser is not supported yet; leave it out");
        }
        if let Some(layer) = self.layers.iter().flatten().find(|l| **l >= self.num_layers) {
            return fail("layers", format!("names layer {layer} of {}", self.num_layers), "layers count from 0");
        }
        if self.layers.as_ref().is_some_and(Vec::is_empty) {
            return fail("layers", "is empty".into(), "name at least one layer, or leave it out for all");
        }
        Ok(())
    }

    /// Whether the adapter belongs to a model of this shape.
    ///
    /// # Errors
    /// Names the first number that differs.
    pub fn check_fits(&self, spec: &DecoderSpec) -> Result<()> {
        let attention = &spec.attention;
        let pairs = [
            ("num_layers", self.num_layers, spec.num_layers),
            ("num_heads", self.num_heads, attention.num_heads),
            ("num_kv_heads", self.num_kv_heads.unwrap_or(attention.num_kv_heads), attention.num_kv_heads),
            ("head_dim", self.head_dim, attention.head_dim),
        ];
        match pairs.into_iter().find(|(_, adapter, model)| adapter != model) {
            Some((field, adapter, model)) => {
                Err(Error::OtherModel { field, adapter, model, base_model: self.base_model.clone() })
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_fields_suffice() {
        let config: AdapterConfig =
            serde_json::from_str(r#"{"method": "prefix_plus", "num_layers": 2, "num_heads": 4, "head_dim": 16}"#)
                .unwrap();
        config.check().unwrap();
        insta::assert_json_snapshot!(config, @r#"
        {
          "format_version": 1,
          "method": "prefix_plus",
          "base_model": null,
          "num_layers": 2,
          "num_heads": 4,
          "num_kv_heads": null,
          "head_dim": 16,
          "feature_map": "elu",
          "query": "post_rope",
          "sharing": "head",
          "rank": null,
          "gate": "none",
          "normalizer": false,
          "layers": null
        }
        "#);
    }

    #[test]
    fn what_is_not_computed_is_refused() {
        let base: AdapterConfig =
            serde_json::from_str(r#"{"method": "prefix_plus", "num_layers": 2, "num_heads": 4, "head_dim": 16}"#)
                .unwrap();
        let messages = [
            AdapterConfig { format_version: 9, ..base.clone() },
            AdapterConfig { num_heads: 0, ..base.clone() },
            AdapterConfig { rank: Some(4), ..base.clone() },
            AdapterConfig { normalizer: true, ..base.clone() },
            AdapterConfig { layers: Some(vec![2]), ..base.clone() },
            AdapterConfig { layers: Some(vec![]), ..base },
        ]
        .map(|config| config.check().unwrap_err().to_string());
        insta::assert_snapshot!(messages.join("\n"), @"
        adapter_config.json: `format_version` is 9, this prefold knows up to 1
        adapter_config.json: `num_heads` is 0
        adapter_config.json: `rank` is 4
        adapter_config.json: `normalizer` is true
        adapter_config.json: `layers` names layer 2 of 2
        adapter_config.json: `layers` is empty
        ");
    }
}

//! `adapter_config.json`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{AdapterMethod, Error, Full, Lora, Prefix, PrefixPlus, Result};
use crate::base::{DecoderSpec, Linear};

/// The layout of `adapter_config.json` that this version writes.
pub const FORMAT_VERSION: u32 = 1;

/// What an adapter is. Only `method`, `num_layers`, `num_heads` and `head_dim` are required in a file, for lora also
/// `hidden_size` and `intermediate_size`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AdapterConfig {
    /// Version of this layout.
    #[serde(default = "format_version")]
    pub format_version: u32,
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
    /// Width of the residual stream.
    #[serde(default)]
    pub hidden_size: Option<usize>,
    /// Width between the projections of the MLP.
    #[serde(default)]
    pub intermediate_size: Option<usize>,
    /// The layers that are adapted; all where not given.
    #[serde(default)]
    pub layers: Option<Vec<usize>>,
    /// The method and its options.
    #[serde(flatten)]
    pub method: Method,
}

/// What is trained. A new method is a variant here and in [`as_method`](Self::as_method).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "method", rename_all = "snake_case")]
pub enum Method {
    /// Prefix-Tuning+ (arXiv 2506.13674, Eq. 7).
    PrefixPlus(PrefixPlus),
    /// Prefix tuning (Li and Liang, arXiv 2101.00190).
    Prefix(Prefix),
    /// LoRA (arXiv 2106.09685) and its variants.
    Lora(Lora),
    /// Full fine-tuning.
    Full(Full),
}

impl Method {
    /// What the method says of itself.
    pub fn as_method(&self) -> &dyn AdapterMethod {
        match self {
            Self::PrefixPlus(method) => method,
            Self::Prefix(method) => method,
            Self::Lora(method) => method,
            Self::Full(method) => method,
        }
    }

    /// Its name in files.
    pub fn name(&self) -> &'static str {
        match self {
            Self::PrefixPlus(_) => "prefix_plus",
            Self::Prefix(_) => "prefix",
            Self::Lora(_) => "lora",
            Self::Full(_) => "full",
        }
    }
}

fn format_version() -> u32 {
    FORMAT_VERSION
}

impl AdapterConfig {
    /// A method with its options for a base model.
    pub fn new(method: Method, spec: &DecoderSpec, base_model: Option<String>) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            base_model,
            num_layers: spec.num_layers,
            num_heads: spec.attention.num_heads,
            num_kv_heads: Some(spec.attention.num_kv_heads),
            head_dim: spec.attention.head_dim,
            hidden_size: Some(spec.hidden_size),
            intermediate_size: Some(spec.mlp.intermediate_size),
            layers: None,
            method,
        }
    }

    /// Prefix-Tuning+ with its defaults for a base model.
    pub fn prefix_plus(spec: &DecoderSpec, base_model: Option<String>) -> Self {
        Self::new(Method::PrefixPlus(PrefixPlus::default()), spec, base_model)
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

    /// Whether a layer is adapted.
    pub fn adapts(&self, layer: usize) -> bool {
        layer < self.num_layers && self.layers.as_ref().is_none_or(|layers| layers.contains(&layer))
    }

    /// Key-value heads of the base model.
    pub fn kv_heads(&self) -> usize {
        self.num_kv_heads.unwrap_or(self.num_heads)
    }

    /// Width of all key heads together.
    pub fn kv_width(&self) -> usize {
        self.kv_heads().saturating_mul(self.head_dim)
    }

    /// `[out, in]` of a linear map; zero where the configuration does not say.
    pub fn linear_shape(&self, linear: Linear) -> [usize; 2] {
        let hidden = self.hidden_size.unwrap_or(0);
        let inner = self.intermediate_size.unwrap_or(0);
        let queries = self.num_heads.saturating_mul(self.head_dim);
        match linear {
            Linear::Query => [queries, hidden],
            Linear::Key | Linear::Value => [self.kv_width(), hidden],
            Linear::AttentionOutput => [hidden, queries],
            Linear::Gate | Linear::Up => [inner, hidden],
            Linear::Down => [hidden, inner],
        }
    }

    /// Number of trained parameters.
    pub fn num_parameters(&self, spec: &DecoderSpec) -> usize {
        let Some(tensors) = self.method.as_method().tensors(self) else { return spec.num_parameters() };
        tensors.values().map(|tensor| tensor.shape.iter().product::<usize>()).sum()
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
        for (field, value) in [
            ("num_layers", self.num_layers),
            ("num_heads", self.num_heads),
            ("num_kv_heads", self.kv_heads()),
            ("head_dim", self.head_dim),
        ] {
            if value == 0 || value > 1 << 20 {
                return fail(field, format!("is {value}"), "it is a count of the base model");
            }
        }
        if !self.num_heads.is_multiple_of(self.kv_heads()) {
            let why = format!("is {}, which does not divide {} query heads", self.kv_heads(), self.num_heads);
            return fail("num_kv_heads", why, "it is a count of the base model");
        }
        if let Some(layer) = self.layers.iter().flatten().find(|l| **l >= self.num_layers) {
            return fail("layers", format!("names layer {layer} of {}", self.num_layers), "layers count from 0");
        }
        if self.layers.as_ref().is_some_and(Vec::is_empty) {
            return fail("layers", "is empty".into(), "name at least one layer, or leave it out for all");
        }
        self.method.as_method().check(self)
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
            ("hidden_size", self.hidden_size.unwrap_or(spec.hidden_size), spec.hidden_size),
            (
                "intermediate_size",
                self.intermediate_size.unwrap_or(spec.mlp.intermediate_size),
                spec.mlp.intermediate_size,
            ),
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

    fn config(json: &str) -> AdapterConfig {
        serde_json::from_str(json).unwrap()
    }

    const FOUR: &str = r#"{"method": "prefix_plus", "num_layers": 2, "num_heads": 4, "head_dim": 16}"#;

    #[test]
    fn four_fields_suffice() {
        let config = config(FOUR);
        config.check().unwrap();
        insta::assert_json_snapshot!(config, @r#"
        {
          "format_version": 1,
          "base_model": null,
          "num_layers": 2,
          "num_heads": 4,
          "num_kv_heads": null,
          "head_dim": 16,
          "hidden_size": null,
          "intermediate_size": null,
          "layers": null,
          "method": "prefix_plus",
          "feature_map": "elu",
          "query": "post_rope",
          "sharing": "head",
          "rank": null,
          "gate": "none",
          "normalizer": false,
          "init": "zeros"
        }
        "#);
    }

    #[test]
    fn what_is_not_computed_is_refused() {
        let base = config(FOUR);
        let with = |fields: serde_json::Value| {
            let mut json = serde_json::to_value(&base).unwrap();
            json.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            serde_json::from_value::<AdapterConfig>(json).unwrap()
        };
        let lora = |fields: serde_json::Value| {
            let mut json = serde_json::json!({"method": "lora", "hidden_size": 64, "intermediate_size": 96});
            json.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            with(json)
        };
        use serde_json::json;
        let messages = [
            with(json!({"format_version": 9})),
            with(json!({"num_heads": 0})),
            with(json!({"num_kv_heads": 3})),
            with(json!({"rank": 0})),
            with(json!({"rank": 16})),
            with(json!({"rank": 4, "init": "prompt"})),
            with(json!({"layers": [2]})),
            with(json!({"layers": []})),
            with(json!({"method": "prefix", "num_virtual_tokens": 0, "init": "random"})),
            with(json!({"method": "prefix", "init": "prompt", "projection": true})),
            with(json!({"method": "lora", "rank": 4})),
            lora(json!({"rank": 0})),
            lora(json!({"rank": 4, "targets": []})),
            lora(json!({"rank": 4, "modules": ["layers.7.self_attn.q_proj"]})),
            with(json!({"method": "full", "layers": [0]})),
        ]
        .map(|config| config.check().err().map_or("accepted".into(), |error| error.to_string()));
        insta::assert_snapshot!(messages.join("\n"), @"
        adapter_config.json: `format_version` is 9, this prefold knows up to 1
        adapter_config.json: `num_heads` is 0
        adapter_config.json: `num_kv_heads` is 3, which does not divide 4 query heads
        adapter_config.json: `rank` is 0
        adapter_config.json: `rank` is 16
        adapter_config.json: `rank` is given with init = prompt
        adapter_config.json: `layers` names layer 2 of 2
        adapter_config.json: `layers` is empty
        adapter_config.json: `num_virtual_tokens` is 0
        adapter_config.json: `init` is prompt with projection = true
        adapter_config.json: `hidden_size` is missing or no width
        adapter_config.json: `rank` is 0
        adapter_config.json: `targets` leaves nothing to adapt
        adapter_config.json: `modules` names `layers.7.self_attn.q_proj`
        adapter_config.json: `layers` is given with method = full
        ");
    }
}

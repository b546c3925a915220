//! Which keys a query sees: the attention mask, causality, sliding windows.

use super::Result;
use super::writer::GraphWriter;
use crate::onnx::DataType;

/// Index columns and padding, shared by the masks of all windows.
#[derive(Debug)]
pub(super) struct Mask {
    /// `past..total`, `[sequence, 1]`; and `0..total`.
    queries: String,
    keys: String,
    /// Whether a query sees a key by padding and causality, `[batch, 1, sequence, total]`.
    causal: String,
}

fn at(name: &str) -> String {
    format!("/model/mask/{name}")
}

impl Mask {
    pub(super) fn new(graph: &mut GraphWriter) -> Self {
        let real = real_keys(graph);
        let past = graph.dimension(&at("past"), "past_key_values.0.key", 2);
        let total = graph.dimension(&at("total"), "attention_mask", 1);
        let (zero, one) = (graph.integer(0), graph.integer(1));
        let queries = graph.node("Range", &at("Range_queries"), &[&past, &total, &one]);
        let queries = graph.unsqueeze(&at("Unsqueeze_queries"), &queries, &[1]);
        let keys = graph.node("Range", &at("Range_keys"), &[&zero, &total, &one]);
        let causal = graph.node("LessOrEqual", &at("LessOrEqual"), &[&keys, &queries]);
        let causal = graph.node("And", &at("And"), &[&real, &causal]);
        Self { queries, keys, causal }
    }

    /// What is added to the scores, `[batch, 1, sequence, total]`: zero where `query - window < key <= query` and the key is
    /// a real token.
    pub(super) fn bias(&self, graph: &mut GraphWriter, window: Option<usize>) -> Result<String> {
        let Some(window) = window else { return select(graph, &at("Where"), &self.causal) };
        let at = |name: &str| at(&format!("window_{window}/{name}"));
        let width = graph.integer(i64::try_from(window).unwrap_or(i64::MAX));
        let first = graph.node("Sub", &at("Sub"), &[&self.queries, &width]);
        let near = graph.node("Greater", &at("Greater"), &[&self.keys, &first]);
        let visible = graph.node("And", &at("And"), &[&self.causal, &near]);
        select(graph, &at("Where"), &visible)
    }

    /// The same for padding alone, `[batch, 1, 1, total]`.
    pub(super) fn padding(graph: &mut GraphWriter) -> Result<String> {
        let real = real_keys(graph);
        select(graph, &at("Where"), &real)
    }
}

fn real_keys(graph: &mut GraphWriter) -> String {
    let real = graph.cast_always(&at("Cast_real"), "attention_mask", DataType::Bool);
    graph.unsqueeze(&at("Unsqueeze_real"), &real, &[1, 2])
}

fn select(graph: &mut GraphWriter, name: &str, visible: &str) -> Result<String> {
    // half of a half type's range, so that a sum with a score stays finite; its exponential is zero all the same
    let lowest = match graph.data_type() {
        DataType::Float16 => -32752.0,
        DataType::Bfloat16 => f64::from(half::bf16::MIN) / 2.0,
        _ => f64::from(f32::MIN),
    };
    let (zero, lowest) = (graph.number(0.0)?, graph.number(lowest)?);
    Ok(graph.node("Where", name, &[visible, &zero, &lowest]))
}

//! The `portable` dialect: operators of `ai.onnx` 17 alone, written so that they run with symbolic dimensions in tract.

use super::Result;
use super::attention::Composed;
use super::decoder::{Operators, Projected};
use super::writer::GraphWriter;
use crate::onnx::NodeDef;

/// Standard operators.
#[derive(Debug)]
pub(super) struct Portable {
    attention: Composed,
}

impl Portable {
    pub(super) fn new(graph: &mut GraphWriter) -> Result<Self> {
        Ok(Self { attention: Composed::new(graph)? })
    }
}

impl Operators for Portable {
    fn attention(&mut self, graph: &mut GraphWriter, layer: usize, projected: &Projected) -> Result<String> {
        self.attention.make(graph, layer, projected)
    }

    /// `Gemm` multiplies by the `[vocab, width]` matrix as it stands, so that a tied embedding is stored once.
    fn vocabulary(&mut self, graph: &mut GraphWriter, hidden: &str, matrix: &str, output: &str) -> Result<()> {
        let (width, vocab) = (graph.spec().embedding_width() as i64, graph.spec().vocab_size as i64);
        let hidden = graph.reshape("/lm_head/Reshape_rows", hidden, &[-1, width]);
        let gemm = NodeDef::new("Gemm", "/lm_head/Gemm").attr_int("transB", 1);
        let logits = graph.node_with(gemm, "/lm_head/Gemm", &[&hidden, matrix]);
        let shape = graph.node("Shape", "/lm_head/Shape", &["input_ids"]);
        let vocab = graph.integers(&[vocab]);
        let shape = graph.concat("/lm_head/Concat", 0, &[&shape, &vocab]);
        graph.add(NodeDef::new("Reshape", "/lm_head/Reshape_logits").inputs([logits, shape]).outputs([output]));
        Ok(())
    }
}

//! The place of the term in a graph of a static quantiser.
//!
//! ```text
//! output ─ QuantizeLinear ─ DequantizeLinear ─ (Transpose | Reshape | Quantize… ─ Dequantize…)* ─ o_proj
//!                                                                                  ▲
//!                                                                        the term is added here
//! ```
//! The ranges of these pairs were measured without an adapter: a sum that went through them would be cut off at their ends. So
//! the output of a site is what the last of them gives.

use super::Site;
use super::axes::Axes;
use super::decomposed::{MAX_STEPS, laid_out_by, lays_out, readers};
use crate::onnx::Index;

/// Moves the output of a site behind the quantisers that follow it.
pub(super) fn move_behind(index: &Index, site: &mut Site) {
    let (mut axes, mut tensor) = (Axes::of_layout(site.output_layout), site.output.clone());
    for _ in 0..MAX_STEPS {
        let [reader] = readers(index, &tensor)[..] else { return };
        let Some(node) = index.graph().node(reader.node).filter(|node| lays_out(node)) else { return };
        let Some((after, output)) = laid_out_by(index, node, &axes).zip(node.output(0)) else { return };
        (axes, tensor) = (after, output.to_owned());
        if let Some(layout) = axes.layout().filter(|_| node.is("", "DequantizeLinear")) {
            site.output.clone_from(&tensor);
            site.output_layout = layout;
            site.readers = readers(index, &tensor);
        }
    }
}

//! From the residual stream to logits.

use super::Result;
use super::decoder::Operators;
use super::mlp::matmul;
use super::writer::GraphWriter;
use crate::base::WeightRole;
use crate::onnx::NodeDef;

/// The logits, as the output of that name:
/// ```text
/// hidden ─ (MatMul projection) ─ product with the matrix ─ (Add bias) ─ (Mul scale) ─ (Div cap ─ Tanh ─ Mul cap) ─ logits
/// ```
pub(super) fn make(
    graph: &mut GraphWriter,
    operators: &mut dyn Operators,
    hidden: &str,
    embedding: &str,
) -> Result<()> {
    let (head, width) = (graph.spec().head, graph.spec().embedding.width);
    let hidden = match width {
        Some(_) => matmul(graph, "/model/project_out", WeightRole::HeadProjection, hidden)?,
        None => hidden.to_owned(),
    };
    let matrix = if head.tied { embedding.to_owned() } else { graph.weight(WeightRole::Head)? };
    let mut steps: Vec<(&str, &str, Option<String>)> = Vec::new();
    if head.bias {
        steps.push(("Add", "Add_bias", Some(graph.weight(WeightRole::HeadBias)?)));
    }
    if head.scale != 1.0 {
        steps.push(("Mul", "Mul_scale", Some(graph.number(head.scale)?)));
    }
    if let Some(cap) = head.softcap {
        let cap = graph.number(cap)?;
        steps.extend([("Div", "softcap/Div", Some(cap.clone())), ("Tanh", "softcap/Tanh", None)]);
        steps.push(("Mul", "softcap/Mul", Some(cap)));
    }
    let last = steps.len();
    let output = |step: usize| if step == last { "logits".into() } else { format!("/lm_head/step_{step}") };
    operators.vocabulary(graph, &hidden, &matrix, &output(0))?;
    for (step, (op, name, operand)) in steps.into_iter().enumerate() {
        let node = NodeDef::new(op, format!("/lm_head/{name}")).inputs([output(step)]);
        graph.add(node.inputs(operand).outputs([output(step + 1)]));
    }
    Ok(())
}

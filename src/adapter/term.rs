//! The term that a context-based method adds to an attention output, as data: steps from the query and the adapter's
//! tensors to the sum. [`TermHook`] runs it with candle; `fold` writes it as nodes.
//!
//! A value that depends on the query is `[batch, heads, seq, n]`. One that does not is `[groups, rows, columns]`, where
//! `groups` is 1 or divides the number of query heads; neighbouring heads share a group.

use std::borrow::Cow;
use std::collections::BTreeMap;

use candle_core::{D, Result, Tensor};

use super::Query;
use crate::base::ops::{Feature, elu, head_linear};
use crate::base::{Linear, Site, SiteHook};

/// An elementwise function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Map {
    /// `x` where positive, else `exp(x) − 1`.
    Elu,
    /// `elu(x) + 1`, which is positive.
    EluPlusOne,
    /// `x · Φ(x)` with the Gaussian error function.
    Gelu,
    /// `max(x, 0)`.
    Relu,
    /// `x · sigmoid(x)`.
    Silu,
    /// `ln(1 + exp(x))`.
    Softplus,
    /// `x` itself.
    Identity,
    /// `|x|`.
    Abs,
}

impl Map {
    /// The function of every element.
    ///
    /// # Errors
    /// When candle fails.
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Elu => elu(x),
            Self::EluPlusOne => elu(x)? + 1.0,
            Self::Gelu => x.gelu_erf(),
            Self::Relu => x.relu(),
            Self::Silu => x.silu(),
            // ln(1 + exp(x)) without overflow
            Self::Softplus => x.relu()? + ((x.abs()?.neg()?.exp()? + 1.0)?).log()?,
            Self::Identity => Ok(x.clone()),
            Self::Abs => x.abs(),
        }
    }
}

/// A function of two values, element by element; dimensions of one element are repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binary {
    /// The sum.
    Add,
    /// The product.
    Mul,
    /// The quotient.
    Div,
}

/// A value: the number of the step that makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value(usize);

impl Value {
    /// The step's position.
    pub fn index(self) -> usize {
        self.0
    }
}

/// One step.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// The query of the site, `[batch, heads, seq, head_dim]`.
    Query(Query),
    /// A tensor of the adapter, `[groups, rows, columns]`.
    Tensor(String),
    /// A number, `[1, 1, 1]`.
    Number(f64),
    /// An elementwise function.
    Map(Map, Value),
    /// The matrix product; the right side does not depend on the query.
    MatMul(Value, Value),
    /// An elementwise function of two values.
    Binary(Binary, Value, Value),
}

/// A term; its last step is its value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Term {
    steps: Vec<Step>,
    labels: BTreeMap<usize, String>,
}

impl Term {
    /// The query.
    pub fn query(&mut self, query: Query) -> Value {
        self.push(Step::Query(query))
    }

    /// A tensor of the adapter.
    pub fn tensor(&mut self, name: impl Into<String>) -> Value {
        self.push(Step::Tensor(name.into()))
    }

    /// A number.
    pub fn number(&mut self, number: f64) -> Value {
        self.push(Step::Number(number))
    }

    /// An elementwise function of a value.
    pub fn map(&mut self, map: Map, x: Value) -> Value {
        self.push(Step::Map(map, x))
    }

    /// The matrix product of two values.
    pub fn matmul(&mut self, left: Value, right: Value) -> Value {
        self.push(Step::MatMul(left, right))
    }

    /// An elementwise function of two values.
    pub fn binary(&mut self, function: Binary, left: Value, right: Value) -> Value {
        self.push(Step::Binary(function, left, right))
    }

    /// Names a value that is computed from several tensors, as a graph that holds it calls it.
    pub fn label(&mut self, value: Value, name: impl Into<String>) {
        self.labels.insert(value.0, name.into());
    }

    /// The name of a value, where it was given one.
    pub fn label_of(&self, value: Value) -> Option<&str> {
        self.labels.get(&value.0).map(String::as_str)
    }

    fn push(&mut self, step: Step) -> Value {
        self.steps.push(step);
        Value(self.steps.len() - 1)
    }

    /// The steps in order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// By step, whether its value depends on the query.
    pub fn depends_on_query(&self) -> Vec<bool> {
        let mut depends: Vec<bool> = Vec::with_capacity(self.steps.len());
        for step in &self.steps {
            let of = |value: &Value| depends.get(value.0).copied().unwrap_or(false);
            let found = match step {
                Step::Query(_) => true,
                Step::Tensor(_) | Step::Number(_) => false,
                Step::Map(_, x) => of(x),
                Step::MatMul(left, right) | Step::Binary(_, left, right) => of(left) || of(right),
            };
            depends.push(found);
        }
        depends
    }

    /// Steps that are [`Feature::Elu`] of a query and read by one product alone, with one matrix for each head: the product
    /// takes them in.
    pub(crate) fn fused_features(&self, shape: impl Fn(&str) -> Option<Vec<usize>>, heads: usize) -> Vec<usize> {
        let operands = |step: &Step| match step {
            Step::Map(_, x) => vec![x.0],
            Step::MatMul(left, right) | Step::Binary(_, left, right) => vec![left.0, right.0],
            _ => Vec::new(),
        };
        let is_elu = |at: usize| match self.steps.get(at) {
            Some(Step::Map(Map::Elu, x)) => matches!(self.steps.get(x.0), Some(Step::Query(_))),
            _ => false,
        };
        let is_by_head = |value: &Value| match self.steps.get(value.0) {
            Some(Step::Tensor(name)) => {
                shape(name).is_some_and(|shape| shape.len() == 3 && shape.first() == Some(&heads))
            }
            _ => false,
        };
        let products = self.steps.iter().filter_map(|step| match step {
            Step::MatMul(left, right) if is_elu(left.0) && is_by_head(right) => Some(left.0),
            _ => None,
        });
        let readers = |at: usize| self.steps.iter().flat_map(operands).filter(|read| *read == at).count();
        products.filter(|at| readers(*at) == 1).collect()
    }

    /// The values of all steps; without a site, of those that do not depend on the query.
    ///
    /// # Errors
    /// When a tensor is missing or shapes do not fit.
    pub fn values(
        &self,
        tensors: &BTreeMap<String, Tensor>,
        heads: usize,
        site: Option<&Site>,
    ) -> Result<Vec<Option<Tensor>>> {
        let fused = if site.is_some() {
            self.fused_features(|name| tensors.get(name).map(|t| t.dims().to_vec()), heads)
        } else {
            Vec::new()
        };
        let device = site.map(|site| site.query).or_else(|| tensors.values().next()).map(Tensor::device);
        let device = device.unwrap_or(&candle_core::Device::Cpu);
        let mut values: Vec<Option<Tensor>> = Vec::with_capacity(self.steps.len());
        for step in &self.steps {
            let of = |value: &Value| values.get(value.0).and_then(Option::as_ref);
            let value = match step {
                Step::Query(Query::PostRope) => site.map(|site| site.query.clone()),
                Step::Query(Query::PreRope) => match site.map(|site| site.unrotated) {
                    Some(None) => candle_core::bail!("the query before rotation is not shown"),
                    unrotated => unrotated.flatten().cloned(),
                },
                Step::Tensor(name) => match tensors.get(name) {
                    Some(tensor) => Some(tensor.clone()),
                    None => candle_core::bail!("the adapter has no tensor `{name}`"),
                },
                Step::Number(number) => Some(Tensor::full(*number, (1, 1, 1), device)?),
                Step::Map(..) if fused.contains(&values.len()) => None,
                Step::Map(map, x) => of(x).map(|x| map.apply(x)).transpose()?,
                Step::MatMul(left, right) => match (self.steps.get(left.0), of(right)) {
                    (Some(Step::Map(_, x)), Some(right)) if fused.contains(&left.0) => match of(x) {
                        Some(x) => Some(head_linear(x, &*like(right, x)?, Feature::Elu)?),
                        None => None,
                    },
                    (_, right) => pair(of(left), right).map(|(l, r)| matmul(l, r, heads)).transpose()?,
                },
                Step::Binary(function, left, right) => {
                    pair(of(left), of(right)).map(|(l, r)| binary(*function, l, r, heads)).transpose()?
                }
            };
            values.push(value);
        }
        Ok(values)
    }
}

fn pair<'a>(left: Option<&'a Tensor>, right: Option<&'a Tensor>) -> Option<(&'a Tensor, &'a Tensor)> {
    left.zip(right)
}

/// A value that does not depend on the query in the type and place of one that does, or of another.
fn like<'a>(x: &'a Tensor, other: &Tensor) -> Result<Cow<'a, Tensor>> {
    if x.dtype() == other.dtype() && x.device().same_device(other.device()) {
        return Ok(Cow::Borrowed(x));
    }
    Ok(Cow::Owned(x.to_device(other.device())?.to_dtype(other.dtype())?))
}

fn matmul(left: &Tensor, right: &Tensor, heads: usize) -> Result<Tensor> {
    let right = &*like(right, left)?;
    if left.rank() == 3 {
        let groups = left.dim(0)?.max(right.dim(0)?);
        return spread(left, groups)?.contiguous()?.matmul(&spread(right, groups)?.contiguous()?);
    }
    // heads first, so that one product per group covers the whole batch: [groups, heads / groups · batch · seq, n]
    let (batch, _, seq, width) = left.dims4()?;
    let (groups, _, columns) = right.dims3()?;
    if groups == heads {
        return head_linear(left, right, Feature::Identity);
    }
    let rows = left.transpose(0, 1)?.reshape((groups, heads / groups.max(1) * batch * seq, width))?;
    rows.matmul(right)?.reshape((heads, batch, seq, columns))?.transpose(0, 1)
}

fn binary(function: Binary, left: &Tensor, right: &Tensor, heads: usize) -> Result<Tensor> {
    let apply = |left: &Tensor, right: &Tensor| match function {
        Binary::Add => left.broadcast_add(right),
        Binary::Mul => left.broadcast_mul(right),
        Binary::Div => left.broadcast_div(right),
    };
    let to_heads = |x: &Tensor| if x.dim(0)? == 1 { Ok(x.clone()) } else { spread(x, heads) };
    match (left.rank(), right.rank()) {
        (4, 3) => apply(left, &to_heads(&*like(right, left)?)?),
        (3, 4) => apply(&to_heads(&*like(left, right)?)?, right),
        (3, 3) => {
            let right = if left.elem_count() == 1 { right.clone() } else { like(right, left)?.into_owned() };
            let left = like(left, &right)?;
            let groups = left.dim(0)?.max(right.dim(0)?);
            let to_groups = |x: &Tensor| if x.dim(0)? == 1 { Ok(x.clone()) } else { spread(x, groups) };
            apply(&to_groups(&left)?, &to_groups(&right)?)
        }
        _ => apply(left, right),
    }
}

/// `[groups, rows, columns]` → `[count, rows, columns]`, each group for as many neighbours.
pub fn spread(x: &Tensor, count: usize) -> Result<Tensor> {
    let (groups, rows, columns) = x.dims3()?;
    if groups == count {
        return Ok(x.clone());
    }
    x.unsqueeze(1)?.broadcast_as((groups, count / groups.max(1), rows, columns))?.reshape((count, rows, columns))
}

/// Terms at work on a decoder.
#[derive(Debug)]
pub struct TermHook {
    /// By layer.
    terms: Vec<Option<Term>>,
    heads: usize,
    tensors: BTreeMap<String, Tensor>,
}

impl TermHook {
    /// Takes the terms by layer, the number of query heads, and the tensors on the decoder's device.
    pub fn new(terms: Vec<Option<Term>>, heads: usize, tensors: BTreeMap<String, Tensor>) -> Self {
        Self { terms, heads, tensors }
    }
}

impl SiteHook for TermHook {
    fn changes(&self, _layer: usize, _linear: Linear) -> bool {
        false
    }

    fn sees_unrotated(&self, layer: usize) -> bool {
        let term = self.terms.get(layer).and_then(Option::as_ref);
        term.is_some_and(|term| term.steps.contains(&Step::Query(Query::PreRope)))
    }

    fn term(&self, site: &Site) -> Result<Option<Tensor>> {
        let Some(term) = self.terms.get(site.layer).and_then(Option::as_ref) else { return Ok(None) };
        let mut values = term.values(&self.tensors, self.heads, Some(site))?;
        let value = values.pop().flatten();
        match value {
            Some(value) if value.rank() == 4 => Ok(Some(value)),
            _ => candle_core::bail!("the term of layer {} does not depend on the query", site.layer),
        }
    }
}

/// The last dimension's sum of squares, rooted: `[rows, columns]` → `[rows]`.
pub(super) fn row_norms(x: &Tensor) -> Result<Tensor> {
    x.sqr()?.sum(D::Minus1)?.sqrt()
}

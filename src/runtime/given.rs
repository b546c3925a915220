//! A session that is given some of its inputs with every run: an adapter's values for slots, the row of a bank.

use std::collections::BTreeMap;

use super::{DType, Error, Port, Result, RuntimeInfo, Session, Tensor, Value};

/// What an input is given.
#[derive(Clone, Debug, PartialEq)]
pub enum Given {
    /// This tensor.
    Value(Value),
    /// This number for every row of the batch, `int64[batch]`.
    EveryRow(i64),
}

/// A session with some inputs given beforehand. They are no inputs of it any more.
pub struct WithGiven<S> {
    inner: S,
    inputs: Vec<Port>,
    given: Vec<(String, Given)>,
}

impl<S: Session> WithGiven<S> {
    /// Gives inputs, optional or not, with every run.
    ///
    /// # Errors
    /// When the graph has no input of a name.
    pub fn new(inner: S, given: Vec<(String, Given)>) -> Result<Self> {
        let has = |name: &str| inner.inputs().iter().chain(inner.optional_inputs()).any(|port| port.name == name);
        if let Some((name, _)) = given.iter().find(|(name, _)| !has(name)) {
            return Err(Error::Feed {
                reason: format!("it has no input `{name}`, which was to be given with every run"),
            });
        }
        let is_given = |port: &&Port| given.iter().any(|(name, _)| *name == port.name);
        let inputs = inner.inputs().iter().filter(|port| !is_given(port)).cloned().collect();
        Ok(Self { inner, inputs, given })
    }

    /// Gives the session back.
    pub fn into_session(self) -> S {
        self.inner
    }
}

impl<S: Session> Session for WithGiven<S> {
    fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    fn outputs(&self) -> &[Port] {
        self.inner.outputs()
    }

    fn info(&self) -> RuntimeInfo {
        self.inner.info()
    }

    fn nodes(&self) -> Option<BTreeMap<String, usize>> {
        self.inner.nodes()
    }

    fn run_tensors(&mut self, mut feeds: Vec<(String, Tensor)>) -> Result<Vec<(String, Tensor)>> {
        let batch = feeds.iter().find_map(|(_, tensor)| tensor.shape().first().copied()).unwrap_or(1);
        for (name, given) in &self.given {
            feeds.push((name.clone(), given.value(batch).into()));
        }
        self.inner.run_tensors(feeds)
    }
}

impl Given {
    /// What is fed to a batch of so many rows.
    pub fn value(&self, batch: usize) -> Value {
        match self {
            Self::Value(value) => value.clone(),
            Self::EveryRow(row) => ndarray::Array1::from_elem(batch, *row).into_dyn().into(),
        }
    }

    /// A tensor from its ONNX type, shape and little-endian bytes.
    ///
    /// # Errors
    /// When the type is none that prefold feeds to a runtime, or the bytes are not of this type and shape.
    pub fn from_le_bytes(onnx_type: i32, dims: &[i64], bytes: &[u8]) -> Result<Self> {
        let dtype = DType::from_onnx(onnx_type);
        let dtype =
            dtype.ok_or_else(|| Error::Feed { reason: format!("elements of ONNX type {onnx_type} are not fed") })?;
        let shape: Option<Vec<usize>> = dims.iter().map(|dim| usize::try_from(*dim).ok()).collect();
        let shape = shape.ok_or_else(|| Error::Shape { reason: format!("{dims:?} is negative") })?;
        Value::from_le_bytes(dtype, &shape, bytes).map(Self::Value)
    }
}

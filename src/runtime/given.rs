//! A session that is given some of its inputs with every run: an adapter's values for slots, the rows of a bank.

use std::collections::BTreeMap;

use ndarray::Array1;

use super::{DType, Error, Port, Result, RuntimeInfo, Session, Tensor, Value};

/// What an input is given.
#[derive(Clone, Debug, PartialEq)]
pub enum Given {
    /// This tensor.
    Value(Value),
    /// This number for every row of the batch, `int64[batch]`.
    EveryRow(i64),
}

/// Inputs with what they are given.
pub type NamedGiven = Vec<(String, Given)>;

/// A session with some inputs given beforehand. They are no inputs of it any more.
pub struct WithGiven<S> {
    inner: S,
    inputs: Vec<Port>,
    /// By model.
    models: Vec<NamedGiven>,
    /// The model of each row; none where the first one has all of them.
    active: Vec<usize>,
    /// What the first row's model is given, as the session holds it.
    held: Option<Held>,
}

/// The tensors of one model, by place in what it is given; none where that is made for each batch.
struct Held {
    model: usize,
    tensors: Vec<Option<Tensor>>,
}

impl<S: Session> WithGiven<S> {
    /// Gives inputs, optional or not, with every run.
    ///
    /// # Errors
    /// When the graph has no input of a name.
    pub fn new(inner: S, given: NamedGiven) -> Result<Self> {
        Self::switching(inner, vec![given])
    }

    /// The same with several models, of which [`Session::activate`] chooses; the first one until then. An input with a default
    /// that a model does not name keeps it.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn switching(inner: S, models: Vec<NamedGiven>) -> Result<Self> {
        let has = |name: &str| inner.inputs().iter().chain(inner.optional_inputs()).any(|port| port.name == name);
        if let Some((name, _)) = models.iter().flatten().find(|(name, _)| !has(name)) {
            return Err(Error::Feed {
                reason: format!("it has no input `{name}`, which was to be given with every run"),
            });
        }
        let is_given = |port: &&Port| models.iter().flatten().any(|(name, _)| *name == port.name);
        let inputs = inner.inputs().iter().filter(|port| !is_given(port)).cloned().collect();
        Ok(Self { inner, inputs, models, active: Vec::new(), held: None })
    }

    /// Gives the session back.
    pub fn into_session(self) -> S {
        self.inner
    }

    fn given(&self, model: usize) -> &[(String, Given)] {
        self.models.get(model).map(Vec::as_slice).unwrap_or_default()
    }

    /// What is given to a batch of so many rows.
    fn feeds(&mut self, batch: usize) -> Result<Vec<(String, Tensor)>> {
        if !self.active.is_empty() && self.active.len() != batch {
            let reason = format!("{batch} rows were given to a session that was told of {}", self.active.len());
            return Err(Error::Feed { reason });
        }
        let first = self.active.first().copied().unwrap_or(0);
        let held = match self.held.take().filter(|held| held.model == first) {
            Some(held) => held,
            None => self.hold_model(first)?,
        };
        let feed = |((name, given), held): (&(String, Given), &Option<Tensor>)| {
            let tensor = match given {
                Given::Value(value) => {
                    held.as_ref().and_then(Tensor::again).unwrap_or_else(|| Tensor::from(value.clone()))
                }
                Given::EveryRow(number) => self.rows(name, *number, batch).into(),
            };
            (name.clone(), tensor)
        };
        let feeds = self.given(first).iter().zip(&held.tensors).map(feed).collect();
        self.held = Some(held);
        Ok(feeds)
    }

    fn hold_model(&self, model: usize) -> Result<Held> {
        let hold = |(_, given): &(String, Given)| match given {
            Given::Value(value) => self.inner.hold(value.clone()).map(Some),
            Given::EveryRow(_) => Ok(None),
        };
        Ok(Held { model, tensors: self.given(model).iter().map(hold).collect::<Result<_>>()? })
    }

    /// The number of each row's model, the first one's where a model has none.
    fn rows(&self, name: &str, first: i64, batch: usize) -> Value {
        let of_row = |row: usize| {
            let given = self.given(self.active.get(row).copied().unwrap_or(0));
            let number = |given: &Given| if let Given::EveryRow(number) = given { Some(*number) } else { None };
            given.iter().find(|(other, _)| other == name).and_then(|(_, given)| number(given)).unwrap_or(first)
        };
        (0..batch).map(of_row).collect::<Array1<i64>>().into_dyn().into()
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

    fn hold(&self, value: Value) -> Result<Tensor> {
        self.inner.hold(value)
    }

    fn activate(&mut self, models: &[usize]) -> Result<()> {
        let refused = |reason: &str| Err(Error::Feed { reason: reason.into() });
        if models.iter().any(|model| *model != 0 && *model >= self.models.len()) {
            return refused("it was not told what one of the batch's models is given");
        }
        let values = |model: usize| {
            self.given(model).iter().filter(|(_, given)| matches!(given, Given::Value(_))).collect::<Vec<_>>()
        };
        if let Some(first) = models.first()
            && models.iter().any(|model| values(*model) != values(*first))
        {
            return refused("a slot holds one adapter for the whole batch");
        }
        self.active = models.into();
        Ok(())
    }

    fn run_tensors(&mut self, mut feeds: Vec<(String, Tensor)>) -> Result<Vec<(String, Tensor)>> {
        let batch = feeds.iter().find_map(|(_, tensor)| tensor.shape().first().copied()).unwrap_or(1);
        feeds.extend(self.feeds(batch)?);
        self.inner.run_tensors(feeds)
    }
}

impl Given {
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

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Keeps what it is fed, and counts what it holds.
    struct Fed {
        inputs: Vec<Port>,
        optional: Vec<Port>,
        fed: Vec<(String, Vec<i64>)>,
        holds: Cell<usize>,
    }

    impl Session for Fed {
        fn inputs(&self) -> &[Port] {
            &self.inputs
        }

        fn optional_inputs(&self) -> &[Port] {
            &self.optional
        }

        fn outputs(&self) -> &[Port] {
            &[]
        }

        fn info(&self) -> RuntimeInfo {
            let text = String::new;
            RuntimeInfo { runtime: text(), version: text(), device: text(), optimization: text(), library: None }
        }

        fn run_tensors(&mut self, feeds: Vec<(String, Tensor)>) -> Result<Vec<(String, Tensor)>> {
            let values = |tensor: Tensor| tensor.into_value().unwrap().into_i64().unwrap().iter().copied().collect();
            self.fed = feeds.into_iter().map(|(name, tensor)| (name, values(tensor))).collect();
            Ok(Vec::new())
        }

        fn hold(&self, value: Value) -> Result<Tensor> {
            self.holds.set(self.holds.get() + 1);
            Ok(value.into())
        }
    }

    fn port(name: &str) -> Port {
        Port { name: name.into(), dtype: DType::I64, dims: Vec::new() }
    }

    fn value(number: i64) -> Given {
        Given::Value(Array1::from_elem(1, number).into_dyn().into())
    }

    #[test]
    fn the_active_model_s_values_are_handed_over_once() {
        let inner = Fed { inputs: vec![port("slot")], optional: Vec::new(), fed: Vec::new(), holds: Cell::new(0) };
        let slot = |number| vec![("slot".to_owned(), value(number))];
        let mut session = WithGiven::switching(inner, vec![slot(1), slot(2)]).unwrap();
        let mut holds = |model: usize| {
            session.activate(&[model]).unwrap();
            session.run_tensors(Vec::new()).unwrap();
            (session.inner.fed[0].1[0], session.inner.holds.get())
        };
        assert_eq!([0, 0, 0, 1, 1, 0].map(&mut holds), [(1, 1), (1, 1), (1, 1), (2, 2), (2, 2), (1, 3)]);
    }

    #[test]
    fn every_row_is_given_what_its_model_is_and_slots_are_for_all() {
        let (inputs, optional) = (vec![port("ids"), port("bank")], vec![port("slot")]);
        let inner = Fed { inputs, optional, fed: Vec::new(), holds: Cell::new(0) };
        let row = |row| ("bank".to_owned(), Given::EveryRow(row));
        let slot = |number| ("slot".to_owned(), value(number));
        let models = vec![vec![row(1), slot(7)], vec![row(2), slot(7)], vec![row(0)]];
        let mut session = WithGiven::switching(inner, models).unwrap();
        assert_eq!(session.inputs().iter().map(|port| port.name.as_str()).collect::<Vec<_>>(), ["ids"]);
        let mut fed = |models: &[usize]| {
            session.activate(models)?;
            let ids: Value = Array1::<i64>::zeros(3).into_dyn().into();
            session.run_tensors(vec![("ids".into(), ids.into())])?;
            Ok::<_, Error>(
                session.inner.fed.iter().skip(1).map(|(name, v)| (name.clone(), v.clone())).collect::<Vec<_>>(),
            )
        };
        let named = |name: &str, values: &[i64]| (name.to_owned(), values.to_vec());
        assert_eq!(fed(&[]).unwrap(), [named("bank", &[1, 1, 1]), named("slot", &[7])]);
        assert_eq!(fed(&[0, 1, 0]).unwrap(), [named("bank", &[1, 2, 1]), named("slot", &[7])]);
        assert_eq!(fed(&[2, 2, 2]).unwrap(), [named("bank", &[0, 0, 0])], "the slot keeps its default");
        let refused = |result: Result<Vec<_>>| result.unwrap_err().to_string();
        assert!(refused(fed(&[0, 2, 0])).contains("one adapter for the whole batch"));
        assert!(refused(fed(&[3, 3, 3])).contains("was not told"));
        assert!(refused(fed(&[0, 1])).contains("3 rows were given"));
    }
}

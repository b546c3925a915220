//! The other end of a [`ProcessSession`](super::ProcessSession): a process that holds one graph in one runtime.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::sync::mpsc;
use std::time::Duration;

use super::frame::{self, Feed, Held, Kind, Request, Response};
use super::{Error, Result, Session, Tensor, Value};

/// How long a runtime may take to end once prefold is gone.
const GRACE: Duration = Duration::from_secs(2);

/// Serves the process that started this one, until it closes the connection.
///
/// # Errors
/// When the connection fails.
pub fn serve_parent() -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::fd::AsFd;
        // Standard input is a socket: standard output stays free for what a runtime may print.
        let socket = std::os::unix::net::UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
        serve(socket.try_clone()?, socket)
    }
    #[cfg(not(unix))]
    serve(std::io::stdin(), std::io::stdout())
}

/// Answers requests. They are read by a thread of their own, so that the end of the connection ends a hanging runtime too.
fn serve(mut from: impl Read + Send + 'static, mut to: impl Write) -> std::io::Result<()> {
    let (sender, requests) = mpsc::channel();
    std::thread::spawn(move || {
        while let Ok(request) = frame::read::<Request>(&mut from) {
            if sender.send(request).is_err() {
                return;
            }
        }
        drop(sender);
        std::thread::sleep(GRACE);
        std::process::exit(1);
    });
    let mut server = Server::default();
    while let Ok((request, body)) = requests.recv() {
        let (response, body) = server.answer(request, &body).unwrap_or_else(|error| {
            (Response::Failed { message: error.to_string(), unavailable: error.is_unavailable() }, Vec::new())
        });
        frame::write(&mut to, &response, &body)?;
    }
    Ok(())
}

/// A graph, and the outputs that were not fetched yet.
#[derive(Default)]
pub(super) struct Server {
    session: Option<Box<dyn Session>>,
    held: HashMap<u64, Tensor>,
    next: u64,
}

impl Server {
    pub(super) fn answer(&mut self, request: Request, body: &[u8]) -> Result<(Response, Vec<u8>)> {
        match request {
            Request::Open { setup, graph, fed } => {
                let session = self.session.insert(setup.open(graph.as_ref(), &fed)?);
                let (inputs, outputs) = (session.inputs().into(), session.outputs().into());
                let optional = session.optional_inputs().into();
                Ok((Response::Opened { inputs, optional, outputs, info: session.info() }, Vec::new()))
            }
            Request::Run { feeds, release } => {
                for id in release {
                    self.held.remove(&id);
                }
                Ok((self.run(feeds, body)?, Vec::new()))
            }
            Request::Fetch { id } => {
                let value = self.take(id)?.into_value()?;
                let kind = Kind { dtype: value.dtype(), shape: value.shape().into() };
                Ok((Response::Fetched { kind }, value.to_le_bytes()))
            }
        }
    }

    fn run(&mut self, feeds: Vec<Feed>, mut body: &[u8]) -> Result<Response> {
        let mut tensors = Vec::with_capacity(feeds.len());
        for feed in feeds {
            tensors.push(match feed {
                Feed::Held { name, id } => (name, self.take(id)?),
                Feed::Inline { name, kind } => {
                    let split = kind.bytes().and_then(|bytes| body.split_at_checked(bytes));
                    let (bytes, rest) = split.ok_or_else(|| broken("a tensor is cut"))?;
                    body = rest;
                    (name, Value::from_le_bytes(kind.dtype, &kind.shape, bytes)?.into())
                }
            });
        }
        let session = self.session.as_mut().ok_or_else(|| broken("no graph is loaded"))?;
        let mut outputs = Vec::new();
        for (name, tensor) in session.run_tensors(tensors)? {
            let kind = Kind { dtype: tensor.dtype()?, shape: tensor.shape() };
            self.next = self.next.wrapping_add(1);
            self.held.insert(self.next, tensor);
            outputs.push(Held { name, id: self.next, kind });
        }
        Ok(Response::Ran { outputs, info: session.info(), nodes: session.nodes() })
    }

    fn take(&mut self, id: u64) -> Result<Tensor> {
        self.held.remove(&id).ok_or_else(|| broken("a tensor is asked for that is not held"))
    }
}

fn broken(reason: &str) -> Error {
    Error::Process { runtime: "a runtime".into(), reason: format!("was asked for the impossible: {reason}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::testing::{self, TinyModel};
    use crate::runtime::{NamedValues, Setup};

    fn kind(shape: &[usize]) -> Kind {
        Kind { dtype: crate::runtime::DType::I64, shape: shape.into() }
    }

    #[test]
    fn outputs_are_held_until_they_are_fetched_fed_or_released() {
        let folder = tempfile::tempdir().unwrap();
        let graph = TinyModel { cached: false, external: false }.write(folder.path());
        let mut server = Server::default();
        let run = |release| {
            let feed = |name: &str| Feed::Inline { name: name.into(), kind: kind(&[1, 2]) };
            Request::Run { feeds: vec![feed("input_ids"), feed("attention_mask")], release }
        };
        let feeds: NamedValues = testing::tiny_feeds(1, 2);
        let body: Vec<u8> = feeds.iter().flat_map(|(_, value)| value.to_le_bytes()).collect();
        assert!(server.answer(run(vec![]), &body).is_err(), "nothing is loaded");
        server.answer(Request::Open { setup: Setup::Tract, graph: graph.into(), fed: Vec::new() }, &[]).unwrap();
        assert!(server.answer(run(vec![]), &body[..9]).is_err(), "a cut tensor");
        let Response::Ran { outputs, .. } = server.answer(run(vec![]), &body).unwrap().0 else { panic!() };
        let (response, bytes) = server.answer(Request::Fetch { id: outputs[0].id }, &[]).unwrap();
        assert!(matches!(response, Response::Fetched { kind } if kind.shape == [1, 2, testing::VOCAB]));
        assert_eq!(bytes.len(), 4 * 2 * testing::VOCAB);
        assert!(server.answer(Request::Fetch { id: outputs[0].id }, &[]).is_err(), "fetched twice");
        let Response::Ran { outputs, .. } = server.answer(run(vec![]), &body).unwrap().0 else { panic!() };
        server.answer(run(vec![outputs[0].id]), &body).unwrap();
        assert_eq!(server.held.len(), 1, "the other was released");
    }
}

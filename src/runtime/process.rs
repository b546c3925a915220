//! A runtime in a process of its own. What crashes or hangs there is an error here.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use wait_timeout::ChildExt;

use super::frame::{self, Feed, Kind, Request, Response};
use super::session::order_feeds;
use super::{DType, Error, Port, Result, RuntimeInfo, Session, Setup, Tensor, Value};

/// How much of what a process prints is kept: its last words.
const LAST_WORDS: usize = 600;
/// How long the last words of a process that has ended may take; another one may hold its standard error open.
const WORDS: Duration = Duration::from_secs(2);
/// How long a process may take to end.
const GRACE: Duration = Duration::from_secs(5);

/// How the process of a runtime is started.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The program, which calls [`serve_parent`](super::serve_parent).
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// How long the runtime may take to load a graph, or for one run.
    pub timeout: Duration,
}

/// A graph in a runtime in another process.
pub struct ProcessSession {
    link: Arc<Mutex<Link>>,
    inputs: Vec<Port>,
    optional: Vec<Port>,
    outputs: Vec<Port>,
    info: RuntimeInfo,
    nodes: Option<BTreeMap<String, usize>>,
}

/// A tensor that the process holds. Dropped, it is released with the next run.
pub(super) struct HeldTensor {
    link: Arc<Mutex<Link>>,
    id: Option<u64>,
    kind: Kind,
}

type Answer = std::io::Result<(Response, Vec<u8>)>;

/// The connection.
struct Link {
    runtime: &'static str,
    child: Child,
    timeout: Duration,
    requests: Option<mpsc::Sender<(Request, Vec<u8>)>>,
    answers: mpsc::Receiver<Answer>,
    last_words: Arc<Mutex<Vec<u8>>>,
    /// Closed when all of them are there.
    silent: mpsc::Receiver<()>,
    released: Vec<u64>,
    /// How the process ended.
    ended: Option<String>,
}

impl ProcessSession {
    /// Starts the process and loads a graph there. `fed` are inputs with a default that will be fed.
    ///
    /// # Errors
    /// When the process does not start, crashes or hangs, or the runtime refuses the graph.
    pub fn open(launch: &Launch, setup: &Setup, graph: &Path, fed: &[String]) -> Result<Self> {
        let graph = graph.canonicalize().map_err(crate::files::Error::io("open", graph))?;
        let (graph, mut link) = (graph.into_os_string(), Link::start(launch, setup)?);
        match link.call(Request::Open { setup: setup.clone(), graph, fed: fed.into() }, Vec::new())? {
            (Response::Opened { inputs, optional, outputs, info }, _) => {
                Ok(Self { link: Arc::new(Mutex::new(link)), inputs, optional, outputs, info, nodes: None })
            }
            _ => Err(link.garbled()),
        }
    }
}

impl Session for ProcessSession {
    fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    fn optional_inputs(&self) -> &[Port] {
        &self.optional
    }

    fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    fn info(&self) -> RuntimeInfo {
        self.info.clone()
    }

    fn nodes(&self) -> Option<BTreeMap<String, usize>> {
        self.nodes.clone()
    }

    fn run_tensors(&mut self, feeds: Vec<(String, Tensor)>) -> Result<Vec<(String, Tensor)>> {
        let mut body = Vec::new();
        let mut named = Vec::new();
        for (name, tensor) in order_feeds(&self.inputs, &self.optional, feeds)? {
            named.push(match tensor.into_held() {
                Ok(mut held) if Arc::ptr_eq(&held.link, &self.link) => {
                    Feed::Held { name, id: held.id.take().unwrap_or(0) }
                }
                Ok(held) => inline(name, held.fetch()?, &mut body),
                Err(tensor) => inline(name, tensor.into_value()?, &mut body),
            });
        }
        let mut link = lock(&self.link);
        let release = std::mem::take(&mut link.released);
        match link.call(Request::Run { feeds: named, release }, body)? {
            (Response::Ran { outputs, info, nodes }, _) => {
                (self.info, self.nodes) = (info, nodes);
                let held = |id, kind| Tensor::held(HeldTensor { link: Arc::clone(&self.link), id: Some(id), kind });
                Ok(outputs.into_iter().map(|output| (output.name, held(output.id, output.kind))).collect())
            }
            _ => Err(link.garbled()),
        }
    }
}

fn inline(name: String, value: Value, body: &mut Vec<u8>) -> Feed {
    let kind = Kind { dtype: value.dtype(), shape: value.shape().into() };
    body.extend(value.to_le_bytes());
    Feed::Inline { name, kind }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HeldTensor {
    pub(super) fn dtype(&self) -> DType {
        self.kind.dtype
    }

    pub(super) fn shape(&self) -> &[usize] {
        &self.kind.shape
    }

    /// Copies the tensor here.
    pub(super) fn fetch(mut self) -> Result<Value> {
        let id = self.id.take().unwrap_or(0);
        let mut link = lock(&self.link);
        match link.call(Request::Fetch { id }, Vec::new())? {
            (Response::Fetched { kind }, body) if kind.bytes() == Some(body.len()) => {
                Value::from_le_bytes(kind.dtype, &kind.shape, &body)
            }
            _ => Err(link.garbled()),
        }
    }
}

impl Drop for HeldTensor {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            lock(&self.link).released.push(id);
        }
    }
}

impl std::fmt::Debug for HeldTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeldTensor").field("id", &self.id).field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl Link {
    fn start(launch: &Launch, setup: &Setup) -> Result<Self> {
        let failed = |source: std::io::Error| Error::Process {
            runtime: setup.name().into(),
            reason: format!("cannot be started as {}: {source}", launch.program.display()),
        };
        let mut command = Command::new(&launch.program);
        command.args(&launch.arguments).stderr(Stdio::piped()).envs(setup.environment());
        let (mut child, requests, answers) = connect(command).map_err(failed)?;
        let last_words = Arc::new(Mutex::new(Vec::new()));
        let (speaks, silent) = mpsc::channel();
        if let Some(stderr) = child.stderr.take() {
            let last_words = Arc::clone(&last_words);
            std::thread::spawn(move || {
                listen(stderr, &last_words);
                drop(speaks);
            });
        }
        let (runtime, timeout) = (setup.name(), launch.timeout);
        Ok(Self {
            runtime,
            child,
            timeout,
            requests: Some(requests),
            answers,
            last_words,
            silent,
            released: Vec::new(),
            ended: None,
        })
    }

    fn call(&mut self, request: Request, body: Vec<u8>) -> Result<(Response, Vec<u8>)> {
        if let Some(reason) = &self.ended {
            return Err(self.error(format!("{reason} before")));
        }
        let sent = self.requests.as_ref().is_some_and(|requests| requests.send((request, body)).is_ok());
        let answer =
            if sent { self.answers.recv_timeout(self.timeout) } else { Err(mpsc::RecvTimeoutError::Disconnected) };
        let reason = match answer {
            Ok(Ok((Response::Failed { message, unavailable }, _))) => {
                return Err(Error::Remote { message, unavailable });
            }
            Ok(Ok(answer)) => return Ok(answer),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                self.kill();
                format!("did not answer for {} s and was ended", self.timeout.as_secs_f64())
            }
            Ok(Err(_)) | Err(mpsc::RecvTimeoutError::Disconnected) => self.how_it_ended(),
        };
        self.ended = Some(reason.clone());
        Err(self.error(self.with_last_words(reason)))
    }

    fn how_it_ended(&mut self) -> String {
        match self.child.wait_timeout(GRACE) {
            Ok(Some(status)) => describe(status),
            Ok(None) => {
                self.kill();
                "broke the connection and was ended".into()
            }
            Err(error) => format!("is lost: {error}"),
        }
    }

    fn kill(&mut self) {
        // An error here means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Of a process that has ended; what it said last may still be on its way.
    fn with_last_words(&self, reason: String) -> String {
        let _ = self.silent.recv_timeout(WORDS);
        let words = lock(&self.last_words);
        let words = String::from_utf8_lossy(&words);
        let words = words.trim();
        if words.is_empty() { reason } else { format!("{reason}; it said: {words}") }
    }

    fn error(&self, reason: String) -> Error {
        Error::Process { runtime: self.runtime.into(), reason }
    }

    fn garbled(&self) -> Error {
        self.error("answered something else than it was asked".into())
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.requests = None; // the thread ends, and with it the connection and then the process
        if self.ended.is_none() && !matches!(self.child.wait_timeout(GRACE), Ok(Some(_))) {
            self.kill();
        }
    }
}

type Connection = (Child, mpsc::Sender<(Request, Vec<u8>)>, mpsc::Receiver<Answer>);

/// Starts the process, with a thread that writes a request and reads its answer in turn.
fn connect(mut command: Command) -> std::io::Result<Connection> {
    #[cfg(unix)]
    let (child, mut from, mut to) = {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        let child = command.stdin(std::os::fd::OwnedFd::from(theirs)).stdout(Stdio::null()).spawn()?;
        (child, ours.try_clone()?, ours)
    };
    #[cfg(not(unix))]
    let (child, mut from, mut to) = {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let broken = || std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        let (to, from) = (child.stdin.take().ok_or_else(broken)?, child.stdout.take().ok_or_else(broken)?);
        (child, from, to)
    };
    drop(command); // its copy of the other end would keep the connection open
    let (requests, asked) = mpsc::channel::<(Request, Vec<u8>)>();
    let (answered, answers) = mpsc::channel();
    std::thread::spawn(move || {
        while let Ok((request, body)) = asked.recv() {
            let answer = frame::write(&mut to, &request, &body).and_then(|()| frame::read(&mut from));
            let failed = answer.is_err();
            if answered.send(answer).is_err() || failed {
                return;
            }
        }
    });
    Ok((child, requests, answers))
}

/// Keeps the end of what a process prints.
fn listen(mut from: impl Read, last_words: &Mutex<Vec<u8>>) {
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        let mut words = lock(last_words);
        words.extend_from_slice(buffer.get(..n).unwrap_or_default());
        let surplus = words.len().saturating_sub(LAST_WORDS);
        words.drain(..surplus);
    }
}

fn describe(status: ExitStatus) -> String {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        let name = match signal {
            libc::SIGSEGV => "SIGSEGV, an access to memory that it does not have",
            libc::SIGABRT => "SIGABRT, which it raised itself",
            libc::SIGBUS => "SIGBUS, a file that became shorter or a bad address",
            libc::SIGILL => "SIGILL, an instruction that the processor does not know",
            libc::SIGFPE => "SIGFPE, an integer division by zero",
            libc::SIGKILL => "SIGKILL, as where memory has run out",
            _ => return format!("crashed with signal {signal}"),
        };
        return format!("crashed with {name}");
    }
    match status.code() {
        Some(code) => format!("ended with exit code {code}"),
        None => "ended".into(),
    }
}

//! The processes of a run, joined by TCP connections to process 0.
//!
//! Every collective operation is entered by all processes in the same order. Process 0 adds in the order of the ranks, so that
//! a sum does not depend on who was first.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Error, Launch, Result};

/// First bytes of a connection.
const GREETING: &[u8; 8] = b"prefold1";
/// How long processes wait for each other at the start.
const JOIN: Duration = Duration::from_secs(300);
/// How long a process may be silent: longer than an evaluation takes, shorter than a job's limit.
const SILENCE: Duration = Duration::from_secs(1800);
/// Bytes of a frame's head: operation and length.
const HEAD: usize = 9;

/// The processes of a run.
#[derive(Debug)]
pub struct Group {
    rank: usize,
    world_size: usize,
    /// At process 0 the connections to all others by rank, elsewhere the one to process 0.
    links: Mutex<Vec<Link>>,
    #[cfg(feature = "nccl")]
    ring: std::sync::OnceLock<super::nccl::Ring>,
}

#[derive(Debug)]
struct Link {
    peer: usize,
    stream: TcpStream,
}

/// What a frame is part of; processes that are at different operations are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Operation {
    Sum = 1,
    Broadcast = 2,
    Agree = 3,
}

/// A number that is summed.
trait Number: Copy + std::ops::AddAssign {
    const SIZE: usize;
    fn write(self, bytes: &mut Vec<u8>);
    fn read(bytes: &[u8]) -> Self;
}

macro_rules! number {
    ($type:ty) => {
        impl Number for $type {
            const SIZE: usize = size_of::<$type>();
            fn write(self, bytes: &mut Vec<u8>) {
                bytes.extend_from_slice(&self.to_le_bytes());
            }
            fn read(bytes: &[u8]) -> Self {
                let mut own = [0; size_of::<$type>()];
                own.copy_from_slice(bytes);
                Self::from_le_bytes(own)
            }
        }
    };
}

number!(f32);
number!(f64);

impl Group {
    /// Waits until all processes are there.
    ///
    /// # Errors
    /// When process 0 cannot listen or cannot be reached, or not all come within five minutes.
    pub fn join(launch: &Launch) -> Result<Self> {
        Self::join_within(launch, JOIN)
    }

    fn join_within(launch: &Launch, patience: Duration) -> Result<Self> {
        let links = match launch.rank {
            0 => gather(launch, patience)?,
            _ => vec![Link { peer: 0, stream: connect(launch, patience)? }],
        };
        for link in &links {
            let ready = link.stream.set_nodelay(true).and_then(|()| link.stream.set_read_timeout(Some(SILENCE)));
            ready.map_err(|source| Error::Peer { rank: link.peer, source })?;
        }
        Ok(Self {
            rank: launch.rank,
            world_size: launch.world_size,
            links: Mutex::new(links),
            #[cfg(feature = "nccl")]
            ring: std::sync::OnceLock::new(),
        })
    }

    /// The GPUs of the processes, joined when first asked for.
    #[cfg(feature = "nccl")]
    pub(super) fn ring(&self, device: &candle_core::Device) -> Result<&super::nccl::Ring> {
        if let Some(ring) = self.ring.get() {
            return Ok(ring);
        }
        let ring = super::nccl::Ring::join(self, device)?;
        Ok(self.ring.get_or_init(|| ring))
    }

    /// Number of this process, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of processes.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Puts in place of each number its sum over the processes.
    ///
    /// # Errors
    /// When a process has gone, or is somewhere else in its run.
    pub fn sum_f32(&self, values: &mut [f32]) -> Result<()> {
        self.sum(values)
    }

    /// As [`sum_f32`](Self::sum_f32).
    ///
    /// # Errors
    /// The same.
    pub fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
        self.sum(values)
    }

    fn sum<T: Number>(&self, values: &mut [T]) -> Result<()> {
        let mut links = self.links();
        if self.rank == 0 {
            for link in links.iter_mut() {
                let bytes = link.receive(Operation::Sum, Some(values.len() * T::SIZE))?;
                for (value, other) in values.iter_mut().zip(bytes.chunks_exact(T::SIZE)) {
                    *value += T::read(other);
                }
            }
        }
        let mut bytes = Vec::with_capacity(values.len() * T::SIZE);
        values.iter().for_each(|value| value.write(&mut bytes));
        for link in links.iter_mut() {
            link.send(Operation::Sum, &bytes)?;
        }
        if self.rank > 0 {
            for link in links.iter_mut() {
                let bytes = link.receive(Operation::Sum, Some(bytes.len()))?;
                for (value, sum) in values.iter_mut().zip(bytes.chunks_exact(T::SIZE)) {
                    *value = T::read(sum);
                }
            }
        }
        Ok(())
    }

    /// Gives every process what process 0 has.
    ///
    /// # Errors
    /// When a process has gone, or is somewhere else in its run.
    pub fn broadcast(&self, bytes: &mut Vec<u8>) -> Result<()> {
        for link in self.links().iter_mut() {
            match self.rank {
                0 => link.send(Operation::Broadcast, bytes)?,
                _ => *bytes = link.receive(Operation::Broadcast, None)?,
            }
        }
        Ok(())
    }

    /// Whether any process says yes; all hear the same answer.
    ///
    /// # Errors
    /// When a process has gone, or is somewhere else in its run.
    pub fn any(&self, yes: bool) -> Result<bool> {
        let mut count = [if yes { 1.0 } else { 0.0 }];
        self.sum_f64(&mut count)?;
        Ok(count[0] > 0.0)
    }

    /// Checks that all processes were started alike: `facts` are named texts that must be equal.
    ///
    /// # Errors
    /// Names the first fact that differs from process 0's, at every process.
    pub fn agree(&self, facts: &[(&'static str, String)]) -> Result<()> {
        let text = facts.iter().map(|(_, fact)| fact.replace('\0', " ")).collect::<Vec<_>>().join("\0");
        let mut difference = None;
        let mut links = self.links();
        if self.rank == 0 {
            for link in links.iter_mut() {
                let theirs = link.receive(Operation::Agree, None)?;
                let theirs = String::from_utf8_lossy(&theirs);
                let differs = |((_, mine), theirs): (&(&'static str, String), &str)| mine.replace('\0', " ") != theirs;
                let at = facts.iter().zip(theirs.split('\0').chain(std::iter::repeat(""))).position(differs);
                difference = difference.or(at.map(|at| format!("{at} {}", link.peer)));
            }
        }
        let answer = difference.unwrap_or_default();
        for link in links.iter_mut() {
            link.send(Operation::Agree, if self.rank == 0 { answer.as_bytes() } else { text.as_bytes() })?;
        }
        let answer = match self.rank {
            0 => answer,
            _ => match links.first_mut() {
                Some(link) => String::from_utf8_lossy(&link.receive(Operation::Agree, None)?).into_owned(),
                None => answer,
            },
        };
        match answer.split_once(' ') {
            None => Ok(()),
            Some((at, rank)) => {
                let what = at.parse().ok().and_then(|at: usize| facts.get(at)).map_or("start", |(name, _)| *name);
                Err(Error::Disagree { what, rank: rank.parse().unwrap_or(0) })
            }
        }
    }

    fn links(&self) -> MutexGuard<'_, Vec<Link>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Link {
    fn send(&mut self, operation: Operation, bytes: &[u8]) -> Result<()> {
        let mut head = [operation as u8; HEAD];
        head[1..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        let sent = self.stream.write_all(&head).and_then(|()| self.stream.write_all(bytes));
        sent.map_err(|source| Error::Peer { rank: self.peer, source })
    }

    fn receive(&mut self, operation: Operation, len: Option<usize>) -> Result<Vec<u8>> {
        let failed = |source| Error::Peer { rank: self.peer, source };
        let mut head = [0; HEAD];
        self.stream.read_exact(&mut head).map_err(failed)?;
        let found = read_length(&head[1..]);
        if head[0] != operation as u8 || len.is_some_and(|len| len as u64 != found) {
            return Err(Error::OutOfStep { rank: self.peer });
        }
        // no more than what comes is held
        let mut bytes = Vec::new();
        (&mut self.stream).take(found).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 != found {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(bytes)
    }
}

fn read_length(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// Process 0: takes in the others.
fn gather(launch: &Launch, patience: Duration) -> Result<Vec<Link>> {
    let failed = |why: String| Error::Join { host: launch.host.clone(), port: launch.port, why };
    // a loopback address is meant to be seen by nobody else
    let loopback = address(launch).is_ok_and(|address| address.ip().is_loopback());
    let ip = if loopback { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
    let listener = TcpListener::bind((ip, launch.port))
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
        .map_err(|e| failed(format!("process 0 cannot listen there: {e}")))?;
    let end = Instant::now() + patience;
    let mut links: Vec<Link> = Vec::new();
    while links.len() + 1 < launch.world_size {
        match listener.accept() {
            Ok((stream, _)) => {
                // what is not one of ours is hung up on
                if let Some(peer) = greeted(&stream, launch, &links) {
                    links.push(Link { peer, stream });
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(20)),
            Err(e) => return Err(failed(format!("process 0 cannot accept a connection: {e}"))),
        }
        if Instant::now() > end {
            let missing: Vec<String> = (1..launch.world_size)
                .filter(|rank| links.iter().all(|link| link.peer != *rank))
                .map(|rank| rank.to_string())
                .collect();
            return Err(failed(format!("rank {} did not come within {} s", missing.join(", "), patience.as_secs())));
        }
    }
    links.sort_by_key(|link| link.peer);
    Ok(links)
}

/// The rank of who connected, if it is a process of this run that is not there yet.
fn greeted(mut stream: &TcpStream, launch: &Launch, links: &[Link]) -> Option<usize> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    let mut greeting = [0; 24];
    stream.read_exact(&mut greeting).ok()?;
    let (name, numbers) = greeting.split_at(GREETING.len());
    let (rank, world) = numbers.split_at(8);
    let (rank, world) = (usize::try_from(read_length(rank)).ok()?, read_length(world));
    let is_new = rank > 0 && rank < launch.world_size && links.iter().all(|link| link.peer != rank);
    if name != GREETING || world != launch.world_size as u64 || !is_new {
        return None;
    }
    stream.write_all(GREETING).ok()?;
    Some(rank)
}

/// The other processes: tries until process 0 listens.
fn connect(launch: &Launch, patience: Duration) -> Result<TcpStream> {
    let end = Instant::now() + patience;
    loop {
        let error = match try_connect(launch) {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        if Instant::now() > end {
            let why = format!("rank {} could not reach process 0 for {} s: {error}", launch.rank, patience.as_secs());
            return Err(Error::Join { host: launch.host.clone(), port: launch.port, why });
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn try_connect(launch: &Launch) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&address(launch)?, Duration::from_secs(10))?;
    let mut greeting = GREETING.to_vec();
    greeting.extend_from_slice(&(launch.rank as u64).to_le_bytes());
    greeting.extend_from_slice(&(launch.world_size as u64).to_le_bytes());
    stream.write_all(&greeting)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut answer = [0; GREETING.len()];
    stream.read_exact(&mut answer)?;
    match &answer == GREETING {
        true => Ok(stream),
        false => Err(io::Error::other("who listens there is not process 0 of this run")),
    }
}

fn address(launch: &Launch) -> io::Result<SocketAddr> {
    let mut found = (launch.host.as_str(), launch.port).to_socket_addrs()?.collect::<Vec<_>>();
    found.sort_by_key(SocketAddr::is_ipv6);
    found.into_iter().next().ok_or_else(|| io::Error::other("the host has no address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(rank: usize, world_size: usize, port: u16) -> Launch {
        Launch { rank, world_size, local_rank: rank, host: "127.0.0.1".into(), port }
    }

    fn free_port() -> u16 {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    /// Runs `work` as each process of a group of `world_size`.
    fn run<T: Send>(world_size: usize, work: impl Fn(Group) -> T + Sync) -> Vec<T> {
        let port = free_port();
        std::thread::scope(|scope| {
            let work = &work;
            let start = |rank| scope.spawn(move || work(Group::join(&launch(rank, world_size, port)).unwrap()));
            let threads: Vec<_> = (0..world_size).rev().map(start).collect();
            threads.into_iter().rev().map(|thread| thread.join().unwrap()).collect()
        })
    }

    /// Sums are those of the ranks in order, to the bit, and the same everywhere.
    #[test]
    fn sums_are_taken_in_the_order_of_ranks() {
        let terms = [1e8f32, 1.25, -1e8, 0.5];
        let sums = run(4, |group| {
            let mut values = vec![terms[group.rank()]; 1000];
            group.sum_f32(&mut values).unwrap();
            let mut more = [group.rank() as f64];
            group.sum_f64(&mut more).unwrap();
            (values, more[0], group.any(group.rank() == 2).unwrap(), group.any(false).unwrap())
        });
        let expected = ((terms[0] + terms[1]) + terms[2]) + terms[3];
        for (values, more, some, none) in sums {
            assert!(values.iter().all(|value| value.to_bits() == expected.to_bits()), "{}", values[0]);
            assert_eq!((more, some, none), (6.0, true, false));
        }
    }

    #[test]
    fn what_process_0_has_reaches_all() {
        let heard = run(3, |group| {
            let mut bytes = format!("from {}", group.rank()).into_bytes();
            group.broadcast(&mut bytes).unwrap();
            String::from_utf8(bytes).unwrap()
        });
        assert_eq!(heard, ["from 0"; 3]);
    }

    #[test]
    fn processes_started_differently_are_told_so() {
        let told = run(3, |group| {
            let seed = if group.rank() == 2 { "7" } else { "0" };
            let facts = [("data", "a\0b".to_owned()), ("options", seed.to_owned())];
            group.agree(&facts[..1]).unwrap();
            group.agree(&facts).unwrap_err().to_string()
        });
        for message in told {
            assert_eq!(message, "the options of rank 2 differ from those of rank 0");
        }
    }

    #[test]
    fn a_process_that_goes_away_is_named() {
        let ends = run(3, |group| {
            if group.rank() == 1 {
                return String::new();
            }
            group.sum_f32(&mut [1.0]).unwrap_err().to_string()
        });
        assert!(ends[0].contains("rank 1"), "{}", ends[0]);
        assert!(ends[2].contains("rank 0"), "{}", ends[2]);
    }

    #[test]
    fn processes_at_different_places_are_told_so() {
        let ends = run(2, |group| match group.rank() {
            0 => group.sum_f32(&mut [1.0, 2.0]).map_err(|e| e.to_string()),
            _ => group.sum_f32(&mut [1.0]).map_err(|e| e.to_string()),
        });
        assert!(ends[0].as_ref().unwrap_err().contains("rank 1 is not at the same place"), "{ends:?}");
    }

    /// Somebody else's connection neither joins nor holds the run up; who is missing is said.
    #[test]
    fn strangers_do_not_join() {
        let port = free_port();
        let error = std::thread::scope(|scope| {
            let hub =
                scope.spawn(move || Group::join_within(&launch(0, 3, port), Duration::from_millis(800)).unwrap_err());
            let stranger = scope.spawn(move || {
                let mut stream = loop {
                    match TcpStream::connect(("127.0.0.1", port)) {
                        Ok(stream) => break stream,
                        Err(_) => std::thread::sleep(Duration::from_millis(5)),
                    }
                };
                stream.write_all(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n").unwrap();
                stream.read(&mut [0; 8]).unwrap_or(0)
            });
            let second =
                scope.spawn(move || Group::join_within(&launch(2, 3, port), Duration::from_millis(700)).is_ok());
            assert_eq!(stranger.join().unwrap(), 0);
            second.join().unwrap();
            hub.join().unwrap()
        });
        assert!(error.to_string().contains("rank 1 did not come"), "{error}");
    }
}

//! A blocking client of the daemon's control socket.

use mirror_core::config::Node;
use mirror_core::control::{
    self, CodecError, Command, CommandOutcome, MirrorStatus, NodeStatus, PROTOCOL, Request,
    Response,
};
use mirror_core::error::{ErrorId, Refusal};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a daemon may take to greet and to tell its state.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a command may take: draining and flushing a slow disk included.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(300);

/// A greeted connection to one node's daemon.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    socket: PathBuf,
    /// The daemon's process id, as it says.
    pub pid: u32,
}

impl Client {
    /// Connects and greets.
    pub fn connect(node: &Node) -> Result<Client, Refusal> {
        let socket = node.control_socket();
        let stream = UnixStream::connect(&socket).map_err(|error| unreachable(&socket, &error))?;
        stream
            .set_write_timeout(Some(ANSWER_TIMEOUT))
            .map_err(|error| unreachable(&socket, &error))?;
        let mut client = Client {
            stream,
            socket,
            pid: 0,
        };
        match client.ask(&Request::Hello { protocol: PROTOCOL }, ANSWER_TIMEOUT)? {
            Response::Welcome {
                node: name, pid, ..
            } if name == node.name => {
                client.pid = pid;
                Ok(client)
            }
            Response::Welcome { node: name, .. } => Err(client.nonsense(&format!(
                "it belongs to node `{name}`, not `{}`; check run-dir in the configuration",
                node.name
            ))),
            _ => Err(client.nonsense("no welcome; install one version of Kagami everywhere")),
        }
    }

    /// The state of one mirror, or of all.
    pub fn status(&mut self, mirror: Option<&str>) -> Result<NodeStatus, Refusal> {
        let request = Request::Status {
            mirror: mirror.map(str::to_owned),
        };
        match self.ask(&request, ANSWER_TIMEOUT)? {
            Response::Status(status) => Ok(status),
            _ => Err(self.nonsense("no status; install one version of Kagami everywhere")),
        }
    }

    /// The state of one mirror.
    pub fn mirror_status(&mut self, mirror: &str) -> Result<MirrorStatus, Refusal> {
        let status = self.status(Some(mirror))?;
        status
            .mirrors
            .into_iter()
            .find(|status| status.name == mirror)
            .ok_or_else(|| {
                Refusal::new(
                    ErrorId::NotRunning,
                    format!("the daemon does not run mirror `{mirror}`; run `kagami up {mirror}`"),
                )
            })
    }

    /// Has a command carried out.
    pub fn command(&mut self, mirror: &str, command: Command) -> Result<CommandOutcome, Refusal> {
        self.done(&Request::Mirror {
            mirror: mirror.to_owned(),
            command,
        })
    }

    /// Brings one mirror up, or all.
    pub fn up(&mut self, mirror: Option<&str>) -> Result<CommandOutcome, Refusal> {
        self.done(&Request::Up {
            mirror: mirror.map(str::to_owned),
        })
    }

    fn done(&mut self, request: &Request) -> Result<CommandOutcome, Refusal> {
        match self.ask(request, COMMAND_TIMEOUT)? {
            Response::Done(outcome) => Ok(outcome),
            _ => Err(self.nonsense("no outcome; install one version of Kagami everywhere")),
        }
    }

    /// One question and its answer; a refusal of the daemon is this command's refusal.
    fn ask(&mut self, request: &Request, timeout: Duration) -> Result<Response, Refusal> {
        let frame = control::encode(request).map_err(|error| self.malformed(&error))?;
        let body = self
            .stream
            .set_read_timeout(Some(timeout))
            .and_then(|()| self.stream.write_all(&frame))
            .and_then(|()| read_frame(&mut self.stream))
            .map_err(|error| unreachable(&self.socket, &error))?;
        let body = body.map_err(|error| self.malformed(&error))?;
        match control::decode(&body).map_err(|error| self.malformed(&error))? {
            Response::Refused(refusal) => Err(refusal),
            response => Ok(response),
        }
    }

    fn malformed(&self, error: &CodecError) -> Refusal {
        self.nonsense(&format!(
            "{error}; install one version of Kagami everywhere"
        ))
    }

    fn nonsense(&self, what: &str) -> Refusal {
        let socket = self.socket.display();
        Refusal::new(
            ErrorId::DaemonProtocol,
            format!("the daemon at {socket}: {what}"),
        )
    }
}

/// Reads a message's body; the inner error is a length that was not believed.
fn read_frame(stream: &mut impl Read) -> io::Result<Result<Vec<u8>, CodecError>> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix)?;
    let len = match control::decode_length(prefix) {
        Ok(len) => len,
        Err(error) => return Ok(Err(error)),
    };
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    Ok(Ok(body))
}

fn unreachable(socket: &Path, error: &io::Error) -> Refusal {
    let at = socket.display();
    match error.kind() {
        ErrorKind::PermissionDenied => Refusal::new(
            ErrorId::DaemonDenied,
            format!("{at}: {error}; run this as root or as a member of the socket's group"),
        ),
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Refusal::new(
            ErrorId::DaemonUnreachable,
            format!("{at}: no answer in time; look at the daemon's log"),
        ),
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            Refusal::new(
                ErrorId::DaemonUnreachable,
                format!("{at}: the daemon hung up; look at its log"),
            )
        }
        _ => Refusal::new(
            ErrorId::DaemonUnreachable,
            format!("{at}: {error}; start it with `kagami-mirror --config FILE --node NODE`"),
        ),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use mirror_core::types::{DiskState, LinkState, Role};
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;
    use tempfile::TempDir;

    /// A daemon that gives scripted answers, one per request, and keeps what it was asked.
    pub struct FakeDaemon {
        pub node: Node,
        _dir: TempDir,
        thread: Option<JoinHandle<Vec<Request>>>,
    }

    impl FakeDaemon {
        /// Serves one connection: each answer is sent as these bytes, after a request was read.
        pub fn raw(answers: Vec<Vec<u8>>) -> FakeDaemon {
            let dir = TempDir::new().unwrap();
            let node = Node {
                name: "a".to_owned(),
                addresses: vec!["127.0.0.1".parse().unwrap()],
                run_dir: dir.path().to_owned(),
                state_dir: dir.path().to_owned(),
                io_backend: mirror_core::config::IoBackend::Auto,
            };
            let listener = UnixListener::bind(node.control_socket()).unwrap();
            let thread = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut asked = Vec::new();
                for answer in answers {
                    let Ok(Ok(body)) = read_frame(&mut stream) else {
                        break;
                    };
                    asked.push(control::decode(&body).unwrap());
                    if stream.write_all(&answer).is_err() {
                        break;
                    }
                }
                asked
            });
            FakeDaemon {
                node,
                _dir: dir,
                thread: Some(thread),
            }
        }

        pub fn new(answers: &[Response]) -> FakeDaemon {
            FakeDaemon::raw(
                answers
                    .iter()
                    .map(|it| control::encode(it).unwrap())
                    .collect(),
            )
        }

        pub fn asked(mut self) -> Vec<Request> {
            self.thread.take().unwrap().join().unwrap()
        }
    }

    pub fn welcome() -> Response {
        Response::Welcome {
            node: "a".to_owned(),
            version: "0".to_owned(),
            pid: 7,
        }
    }

    pub fn status_of(name: &str) -> NodeStatus {
        let mirror = MirrorStatus {
            name: name.to_owned(),
            role: Role::Primary,
            disk: DiskState::UpToDate,
            link: LinkState::Connecting,
            ..MirrorStatus::default()
        };
        NodeStatus {
            schema: 1,
            node: "a".to_owned(),
            mirrors: vec![mirror],
        }
    }

    #[test]
    fn asks_and_is_answered() {
        let outcome = CommandOutcome {
            warnings: vec!["careful".to_owned()],
        };
        let daemon = FakeDaemon::new(&[
            welcome(),
            Response::Status(status_of("r0")),
            Response::Done(outcome.clone()),
        ]);
        let mut client = Client::connect(&daemon.node).unwrap();
        assert_eq!(client.pid, 7);
        assert_eq!(client.mirror_status("r0").unwrap().role, Role::Primary);
        assert_eq!(client.command("r0", Command::Secondary).unwrap(), outcome);
        drop(client);
        assert_eq!(
            daemon.asked(),
            [
                Request::Hello { protocol: PROTOCOL },
                Request::Status {
                    mirror: Some("r0".to_owned())
                },
                Request::Mirror {
                    mirror: "r0".to_owned(),
                    command: Command::Secondary
                },
            ]
        );
    }

    #[test]
    fn a_refusal_keeps_its_id() {
        let refusal = Refusal::new(ErrorId::PeerIsPrimary, "b is Primary; demote it");
        let daemon = FakeDaemon::new(&[welcome(), Response::Refused(refusal.clone())]);
        let mut client = Client::connect(&daemon.node).unwrap();
        assert_eq!(client.up(None).unwrap_err(), refusal);
    }

    #[test]
    fn no_daemon() {
        let daemon = FakeDaemon::new(&[]);
        std::fs::remove_file(daemon.node.control_socket()).unwrap();
        let refusal = Client::connect(&daemon.node).unwrap_err();
        assert_eq!(refusal.id, ErrorId::DaemonUnreachable);
    }

    #[test]
    fn a_daemon_that_hangs_up_or_babbles() {
        let long = u32::MAX.to_le_bytes().to_vec();
        for (answers, id) in [
            (vec![], ErrorId::DaemonUnreachable),
            (vec![vec![1, 0]], ErrorId::DaemonUnreachable),
            (vec![long], ErrorId::DaemonProtocol),
            (vec![vec![1, 0, 0, 0, 0xff]], ErrorId::DaemonProtocol),
            (
                vec![control::encode(&Response::Done(CommandOutcome::default())).unwrap()],
                ErrorId::DaemonProtocol,
            ),
        ] {
            let daemon = FakeDaemon::raw(answers);
            assert_eq!(Client::connect(&daemon.node).unwrap_err().id, id);
        }
    }

    #[test]
    fn another_nodes_daemon() {
        let welcome = Response::Welcome {
            node: "b".to_owned(),
            version: "0".to_owned(),
            pid: 7,
        };
        let daemon = FakeDaemon::new(&[welcome]);
        let refusal = Client::connect(&daemon.node).unwrap_err();
        assert!(refusal.message.contains("belongs to node `b`"), "{refusal}");
    }
}

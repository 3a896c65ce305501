//! The control socket: what the CLI and the agent ask of this daemon.

use crate::credentials;
use crate::daemon::Daemon;
use crate::mirror::Mirror;
use crate::unix_socket::UnixSocket;
use mirror_core::control::{self, CommandOutcome, NodeStatus, PROTOCOL, Request, Response};
use mirror_core::error::{ErrorId, Refusal};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::task::JoinError;
use tokio::time::{sleep, timeout};

/// Clients at once.
const CLIENTS: usize = 64;

/// How long the rest of a message may take once it began, and an answer to be taken.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a client may be silent between requests.
const IDLE: Duration = Duration::from_secs(600);

/// The longest request; the names in it are short.
const MAX_REQUEST: usize = 64 << 10;

/// Answers clients until the daemon ends.
pub async fn serve(socket: UnixSocket, daemon: Arc<Daemon>) {
    let places = Arc::new(Semaphore::new(CLIENTS));
    loop {
        let stream = match socket.accept().await {
            Ok(stream) => stream,
            Err(error) => {
                log::warn!("control socket: {error}");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let daemon = Arc::clone(&daemon);
        tokio::spawn(async move {
            if let Err(error) = converse(stream, &daemon).await {
                log::debug!("control socket: {error}");
            }
            drop(place);
        });
    }
}

async fn converse(mut stream: UnixStream, daemon: &Daemon) -> io::Result<()> {
    if !credentials::may_control(&stream, daemon.control_socket())? {
        let message = "only root, the daemon's user and the socket's group may control it";
        let refusal = Refusal::new(ErrorId::DaemonDenied, message);
        return answer(&mut stream, &Response::Refused(refusal)).await;
    }
    let mut greeted = false;
    while let Some(request) = receive(&mut stream).await? {
        let response = match request {
            Request::Hello { protocol } if protocol == PROTOCOL => {
                greeted = true;
                Response::Welcome {
                    node: daemon.node().to_owned(),
                    version: env!("CARGO_PKG_VERSION").to_owned(),
                    pid: std::process::id(),
                }
            }
            Request::Hello { protocol } => protocol_refusal(&format!(
                "the client speaks version {protocol}, the daemon {PROTOCOL}"
            )),
            _ if !greeted => protocol_refusal("the client did not say which version it speaks"),
            request => handle(request, daemon).await,
        };
        answer(&mut stream, &response).await?;
    }
    Ok(())
}

fn protocol_refusal(message: &str) -> Response {
    Response::Refused(Refusal::new(ErrorId::DaemonProtocol, message))
}

async fn handle(request: Request, daemon: &Daemon) -> Response {
    let outcome = match request {
        Request::Hello { .. } => Ok(Response::Done(CommandOutcome::default())),
        Request::Status { mirror } => status(mirror.as_deref(), daemon).await,
        Request::Mirror { mirror, command } => match daemon.mirror(&mirror) {
            Ok(mirror) => mirror.command(command).await.map(Response::Done),
            Err(refusal) => Err(refusal),
        },
        Request::Up { mirror } => up(mirror.as_deref(), daemon).await,
    };
    outcome.unwrap_or_else(Response::Refused)
}

async fn status(mirror: Option<&str>, daemon: &Daemon) -> Result<Response, Refusal> {
    let chosen = daemon.chosen(mirror)?;
    let mirrors = of_each(chosen, |mirror| async move { mirror.status().await }).await?;
    Ok(Response::Status(NodeStatus {
        schema: 1,
        node: daemon.node().to_owned(),
        mirrors,
    }))
}

async fn up(mirror: Option<&str>, daemon: &Daemon) -> Result<Response, Refusal> {
    let all = mirror.is_none();
    let outcomes = of_each(daemon.chosen(mirror)?, move |mirror| async move {
        if all && mirror.is_up() {
            Ok(())
        } else {
            mirror.up().await
        }
    });
    outcomes.await?.into_iter().collect::<Result<(), _>>()?;
    Ok(Response::Done(CommandOutcome::default()))
}

/// Asks all mirrors at once, so that none waits for another's trouble; answers are in order.
async fn of_each<T, F>(
    mirrors: &[Arc<Mirror>],
    ask: impl Fn(Arc<Mirror>) -> F,
) -> Result<Vec<T>, Refusal>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let asked: Vec<_> = mirrors
        .iter()
        .map(|mirror| tokio::spawn(ask(Arc::clone(mirror))))
        .collect();
    let mut answers = Vec::new();
    for answer in asked {
        let failed = |error: JoinError| Refusal::new(ErrorId::Internal, error.to_string());
        answers.push(answer.await.map_err(failed)?);
    }
    Ok(answers)
}

/// The next request, or `None` when the client is done.
async fn receive(stream: &mut UnixStream) -> io::Result<Option<Request>> {
    let mut prefix = [0; 4];
    match timeout(IDLE, stream.read(&mut prefix[..1])).await {
        Ok(Ok(0)) | Err(_) => return Ok(None),
        Ok(result) => result?,
    };
    let body = async {
        stream.read_exact(&mut prefix[1..]).await?;
        let len = control::decode_length(prefix).map_err(invalid)?;
        if len > MAX_REQUEST {
            return Err(invalid("request too long"));
        }
        let mut body = vec![0; len];
        stream.read_exact(&mut body).await?;
        Ok(body)
    };
    let body = timeout(PATIENCE, body).await??;
    control::decode(&body).map(Some).map_err(invalid)
}

async fn answer(stream: &mut UnixStream, response: &Response) -> io::Result<()> {
    let bytes = control::encode(response).map_err(invalid)?;
    timeout(PATIENCE, stream.write_all(&bytes)).await?
}

fn invalid(error: impl ToString) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use mirror_core::config::Config;
    use mirror_core::types::BootId;
    use std::path::Path;
    use tokio::sync::Barrier;

    const TWO: &str = r#"
[cluster]
name = "c"
insecure = true
[[node]]
name = "a"
addresses = ["127.0.0.1"]
[[node]]
name = "b"
addresses = ["127.0.0.2"]
[[mirror]]
name = "r0"
port = 7790
disk = { a = "/a0", b = "/b0" }
[[mirror]]
name = "r1"
port = 7791
disk = { a = "/a1", b = "/b1" }
"#;

    #[tokio::test]
    async fn mirrors_are_asked_at_once_and_answer_in_order() {
        let config = Config::parse(TWO, Path::new("k")).expect("good");
        let node = config.node("a").expect("it is there");
        let mirrors = config.mirrors.iter();
        let mirrors: Vec<_> = mirrors
            .map(|mirror| Arc::new(Mirror::new(&config, mirror, node, BootId::default())))
            .collect();
        // Each answers only once the other was asked, too.
        let both = Arc::new(Barrier::new(2));
        let names = of_each(&mirrors, |mirror| {
            let both = Arc::clone(&both);
            async move {
                both.wait().await;
                mirror.config.name.clone()
            }
        });
        let names = timeout(Duration::from_secs(10), names).await;
        let names = names.expect("nobody waits").expect("no task died");
        assert_eq!(names, ["r0", "r1"]);
    }
}

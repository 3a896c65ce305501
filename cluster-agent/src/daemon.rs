//! What the node's daemon says of its mirrors, over its control socket.

use anyhow::{Result, anyhow, bail};
use mirror_core::config::Node;
use mirror_core::control::{self, MirrorStatus, PROTOCOL, Request, Response};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// How long the daemon may take for all of it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks for the state of every mirror.
///
/// # Errors
///
/// The daemon is not there, does not answer, or refuses.
pub async fn status(node: &Node) -> Result<Vec<MirrorStatus>> {
    timeout(PATIENCE, ask_status(node))
        .await
        .map_err(|_| anyhow!("no answer within {PATIENCE:?}"))?
}

async fn ask_status(node: &Node) -> Result<Vec<MirrorStatus>> {
    let mut stream = UnixStream::connect(node.control_socket()).await?;
    ask(&mut stream, &Request::Hello { protocol: PROTOCOL }).await?;
    match ask(&mut stream, &Request::Status { mirror: None }).await? {
        Response::Status(status) => Ok(status.mirrors),
        other => bail!("not a status: {other:?}"),
    }
}

async fn ask(stream: &mut UnixStream, request: &Request) -> Result<Response> {
    stream.write_all(&control::encode(request)?).await?;
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await?;
    let mut body = vec![0; control::decode_length(prefix)?];
    stream.read_exact(&mut body).await?;
    match control::decode(&body)? {
        Response::Refused(refusal) => bail!("{refusal}"),
        response => Ok(response),
    }
}

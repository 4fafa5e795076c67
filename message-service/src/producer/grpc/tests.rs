use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use handfast_proto::v1::business_status_server::{BusinessStatus, BusinessStatusServer};
use tokio_stream::wrappers::TcpListenerStream;
use uuid::Uuid;

use super::*;
use crate::message::Timestamp;

fn id(n: u128) -> MessageId {
    Uuid::from_u128(n).into()
}

fn verdict(id: MessageId, kind: i32) -> v1::Verdict {
    v1::Verdict {
        message_id: id.as_bytes().to_vec(),
        kind,
    }
}

fn question(n: u128) -> Question {
    Question {
        id: id(n),
        topic: "payment.completed".to_owned(),
        key: Some(format!("order {n}")),
        fence: Some(Uuid::from_u128(7)),
        prepared_at: Timestamp::from_micros(5),
    }
}

const COMMITTED: i32 = v1::VerdictKind::Committed as i32;
const ROLLED_BACK: i32 = v1::VerdictKind::RolledBack as i32;

#[test]
fn verdicts_are_matched_by_id_whatever_their_order() {
    let reply = [verdict(id(2), ROLLED_BACK), verdict(id(1), COMMITTED)];
    assert_eq!(
        verdicts(&[id(1), id(2)], &reply),
        [Some(VerdictKind::Committed), Some(VerdictKind::RolledBack)]
    );
}

#[test]
fn missing_foreign_and_malformed_ids_answer_nothing() {
    let malformed = v1::Verdict {
        message_id: vec![1, 2, 3],
        kind: COMMITTED,
    };
    let reply = [verdict(id(9), COMMITTED), malformed];
    assert_eq!(verdicts(&[id(1), id(2)], &reply), [None, None]);
}

#[test]
fn an_id_that_is_answered_twice_is_not_answered() {
    let twice = [verdict(id(1), COMMITTED), verdict(id(1), ROLLED_BACK)];
    assert_eq!(verdicts(&[id(1)], &twice), [None]);
    let thrice = [
        verdict(id(1), COMMITTED),
        verdict(id(1), COMMITTED),
        verdict(id(1), COMMITTED),
    ];
    assert_eq!(verdicts(&[id(1)], &thrice), [None]);
}

#[test]
fn unset_and_unknown_verdicts_are_not_answers() {
    let reply = [verdict(id(1), 0), verdict(id(2), 99), verdict(id(3), -1)];
    assert_eq!(verdicts(&[id(1), id(2), id(3)], &reply), [None, None, None]);
    let cannot_tell = [verdict(id(1), v1::VerdictKind::Unknown as i32)];
    assert_eq!(
        verdicts(&[id(1)], &cannot_tell),
        [Some(VerdictKind::Unknown)]
    );
}

/// Answers the first call with COMMITTED, the second with more than 1 MiB, the third with an
/// error, and the fourth never.
#[derive(Default)]
struct Moody {
    calls: AtomicUsize,
}

#[tonic::async_trait]
impl BusinessStatus for Moody {
    async fn check(
        &self,
        request: tonic::Request<v1::CheckRequest>,
    ) -> Result<tonic::Response<v1::CheckResponse>, tonic::Status> {
        let asked = request.into_inner().questions;
        let verdicts = match self.calls.fetch_add(1, Ordering::SeqCst) {
            0 => asked
                .into_iter()
                .map(|question| v1::Verdict {
                    message_id: question.message_id,
                    kind: COMMITTED,
                })
                .collect(),
            1 => vec![verdict(id(1), COMMITTED); 100_000],
            2 => return Err(tonic::Status::internal("the database is gone")),
            _ => std::future::pending().await,
        };
        Ok(tonic::Response::new(v1::CheckResponse { verdicts }))
    }
}

async fn serve(moody: Moody) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(BusinessStatusServer::new(moody))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    address
}

#[tokio::test]
async fn a_reply_that_is_too_large_failed_or_late_is_no_answer() {
    let endpoint = format!("http://{}", serve(Moody::default()).await);
    let source = GrpcStatus::new(Settings {
        call_timeout: Duration::from_millis(500),
        ..Settings::default()
    });
    assert_eq!(
        source.check(&endpoint, vec![question(1)]).await,
        Ok(vec![Some(VerdictKind::Committed)])
    );
    let large = source.check(&endpoint, vec![question(1)]).await;
    assert!(large.is_err(), "{large:?}");
    let failed = source.check(&endpoint, vec![question(1)]).await;
    assert!(failed.unwrap_err().reason.contains("the database is gone"));
    let late = source.check(&endpoint, vec![question(1)]).await;
    assert!(late.is_err(), "{late:?}");
}

#[tokio::test]
async fn an_endpoint_that_refuses_or_is_no_address_is_unreachable() {
    let source = GrpcStatus::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let free = listener.local_addr().unwrap();
    drop(listener);
    let refused = source
        .check(&format!("http://{free}"), vec![question(1)])
        .await
        .unwrap_err();
    assert!(refused.reason.contains("refused"), "{refused}");
    let nonsense = source.check("not a url", vec![question(1)]).await;
    assert!(nonsense.is_err());
}

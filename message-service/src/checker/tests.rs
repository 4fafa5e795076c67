use std::sync::Mutex;

use async_trait::async_trait;

use super::*;
use crate::message::MessageState;
use crate::producer::{Question, Unreachable, VerdictKind};
use crate::world::{CHECK_AFTER, ENDPOINT, Signals, TOPIC, World, id};

/// Answers every question in the same way, and remembers what it was asked.
struct Scripted {
    answer: Mutex<Option<Option<VerdictKind>>>,
    asked: Mutex<Vec<(String, Vec<Question>)>>,
}

impl Scripted {
    fn says(&self, verdict: VerdictKind) {
        *self.answer.lock().unwrap() = Some(Some(verdict));
    }

    fn is_down(&self) {
        *self.answer.lock().unwrap() = None;
    }

    fn leaves_out_everything(&self) {
        *self.answer.lock().unwrap() = Some(None);
    }

    fn sizes(&self) -> Vec<usize> {
        let asked = self.asked.lock().unwrap();
        asked.iter().map(|(_, questions)| questions.len()).collect()
    }
}

#[async_trait]
impl StatusSource for Scripted {
    async fn check(
        &self,
        endpoint: &str,
        questions: Vec<Question>,
    ) -> Result<Vec<Option<VerdictKind>>, Unreachable> {
        let count = questions.len();
        let asked = (endpoint.to_owned(), questions);
        self.asked.lock().unwrap().push(asked);
        let answer = *self.answer.lock().unwrap();
        answer
            .map(|verdict| vec![verdict; count])
            .ok_or_else(|| Unreachable {
                endpoint: endpoint.to_owned(),
                reason: "down".to_owned(),
            })
    }
}

struct Scene {
    world: World,
    source: Arc<Scripted>,
    broker: Arc<Signals>,
    reached: Arc<Mutex<Vec<bool>>>,
    checker: Arc<Checker>,
}

async fn scene() -> Scene {
    let world = World::new().await;
    let source = Arc::new(Scripted {
        answer: Mutex::new(None),
        asked: Mutex::default(),
    });
    let broker = Arc::new(Signals::default());
    let reached = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&reached);
    let checker = Checker::new(
        world.store.clone(),
        broker.clone(),
        source.clone(),
        world.topology.clone(),
        Arc::new(move |_, reachable| told.lock().unwrap().push(reachable)),
        Settings::default(),
    );
    Scene {
        world,
        source,
        broker,
        reached,
        checker,
    }
}

impl Scene {
    async fn round(&self) -> Report {
        self.checker.run_once().await.unwrap()
    }
}

#[tokio::test]
async fn nothing_is_asked_before_its_time() {
    let scene = scene().await;
    scene.source.says(VerdictKind::Committed);
    scene.world.prepare([1]).await;
    assert_eq!(scene.round().await, Report::default());
    assert!(scene.source.sizes().is_empty());
}

#[tokio::test]
async fn a_committed_message_is_confirmed_and_its_topic_is_due() {
    let scene = scene().await;
    scene.source.says(VerdictKind::Committed);
    scene.world.prepare([1]).await;
    scene.world.clock.advance(CHECK_AFTER);
    assert_eq!(scene.round().await.settled, 1);
    let shown = scene.world.shown(1).await;
    assert_eq!(shown.message.state, MessageState::Confirmed);
    assert_eq!(shown.deliveries.len(), 2);
    assert_eq!(
        *scene.broker.due.lock().unwrap(),
        [[TOPIC.to_owned()].into()]
    );
    let asked = scene.source.asked.lock().unwrap();
    assert_eq!(asked[0].0, ENDPOINT);
    assert_eq!(asked[0].1[0].id, id(1));
}

#[tokio::test]
async fn a_rolled_back_message_is_cancelled() {
    let scene = scene().await;
    scene.source.says(VerdictKind::RolledBack);
    scene.world.prepare([1]).await;
    scene.world.clock.advance(CHECK_AFTER);
    scene.round().await;
    let shown = scene.world.shown(1).await;
    assert_eq!(shown.message.state, MessageState::Cancelled);
    assert!(scene.broker.due.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_producer_that_cannot_tell_is_asked_for_ever_and_flagged() {
    let scene = scene().await;
    scene.source.says(VerdictKind::Unknown);
    scene.world.prepare([1]).await;
    for _ in 0..25 {
        scene.world.clock.advance(Duration::from_secs(700));
        assert_eq!(scene.round().await.answered, 1);
    }
    let shown = scene.world.shown(1).await.message;
    assert_eq!(shown.state, MessageState::Prepared);
    assert!(shown.unresolved);
    assert_eq!(shown.checks, 25);
    scene.source.says(VerdictKind::Committed);
    scene.world.clock.advance(Duration::from_secs(700));
    scene.round().await;
    let shown = scene.world.shown(1).await.message;
    assert_eq!(shown.state, MessageState::Confirmed);
}

#[tokio::test]
async fn a_producer_that_is_down_is_probed_with_one_message_and_nothing_counts() {
    let scene = scene().await;
    scene.world.prepare(1..=150).await;
    scene.world.clock.advance(CHECK_AFTER);
    assert_eq!(scene.round().await.unreachable, 1);
    for _ in 0..3 {
        scene.world.clock.advance(Duration::from_secs(60));
        scene.round().await;
    }
    assert_eq!(scene.source.sizes(), [100, 1, 1, 1]);
    assert_eq!(scene.world.shown(1).await.message.checks, 0);
    assert_eq!(*scene.reached.lock().unwrap(), [false]);

    scene.source.says(VerdictKind::Committed);
    scene.world.clock.advance(Duration::from_secs(60));
    for _ in 0..3 {
        scene.round().await;
    }
    assert_eq!(scene.source.sizes()[4..], [1, 100, 49]);
    assert_eq!(*scene.reached.lock().unwrap(), [false, true]);
    let counts = scene.world.store.counts().await.unwrap();
    assert_eq!((counts.prepared, counts.confirmed), (0, 150));
}

#[tokio::test]
async fn a_reply_without_a_single_verdict_is_no_answer() {
    let scene = scene().await;
    scene.source.leaves_out_everything();
    scene.world.prepare([1]).await;
    scene.world.clock.advance(CHECK_AFTER);
    let report = scene.round().await;
    assert_eq!(
        (report.asked, report.answered, report.unreachable),
        (1, 0, 1)
    );
    assert_eq!(scene.world.shown(1).await.message.checks, 0);
}

#[tokio::test]
async fn two_checkers_at_once_ask_each_message_once() {
    let scene = scene().await;
    scene.source.says(VerdictKind::InProgress);
    scene.world.prepare(1..=50).await;
    scene.world.clock.advance(CHECK_AFTER);
    let (one, two) = tokio::join!(scene.checker.run_once(), scene.checker.run_once());
    assert_eq!(one.unwrap().asked + two.unwrap().asked, 50);
}

#[tokio::test]
async fn a_producer_without_endpoint_is_never_asked() {
    let scene = scene().await;
    scene.source.says(VerdictKind::Committed);
    scene.world.prepare([1]).await;
    scene.world.clock.advance(CHECK_AFTER);
    let mut topology = (*scene.world.topology.get()).clone();
    topology
        .producers
        .get_mut("payment")
        .unwrap()
        .status_endpoint = None;
    scene.world.topology.set(topology);
    assert_eq!(scene.round().await, Report::default());
}

#[tokio::test]
async fn lanes_start_with_the_checker_and_end_with_it() {
    let scene = scene().await;
    scene.source.is_down();
    scene.world.prepare([1]).await;
    scene.world.clock.advance(CHECK_AFTER);
    let stop = CancellationToken::new();
    let running = tokio::spawn(scene.checker.clone().run(stop.clone()));
    scene.world.store.until_called("settle_checks", 1).await;
    stop.cancel();
    tokio::time::timeout(crate::world::DEADLINE, running)
        .await
        .unwrap()
        .unwrap();
}
